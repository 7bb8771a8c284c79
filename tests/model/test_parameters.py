"""The part of the network that a weight belongs to, by its name."""

import pytest

from megavit.model import parameters

# Each name, with those that are true of: encoder, head parts, decoder, last norm, may be missing.
NAMES = {
    "embed.proj.weight": {"is_encoder"},
    "embed.pos_embed": {"is_encoder"},
    "blocks.layers.11.attn.qkv.bias": {"is_encoder"},
    "blocks.final_layernorm.weight": {"is_encoder", "is_final_norm", "may_be_missing"},
    "head.fc_norm.weight": {"is_encoder", "is_final_norm", "may_be_missing"},
    "head.pre.weight": {"is_classifier", "may_be_missing"},
    "head.out.bias": {"is_classifier", "is_last_layer", "may_be_missing"},
    "mae_decoder.embed.weight": {"is_decoder", "may_be_missing"},
    "mae_decoder.blocks.layers.0.mlp.fc1.weight": {"is_decoder", "may_be_missing"},
    "mae_decoder.blocks.final_layernorm.bias": {"is_decoder", "may_be_missing"},
}
QUESTIONS = ("is_encoder", "is_decoder", "is_classifier", "is_last_layer", "is_final_norm", "may_be_missing")


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_belongs_to_these_parts_and_no_others(name):
    new_parameters = ("mae_decoder.",) if name.startswith("mae_decoder.") else ("head.",)
    of_task = {key: {"new_parameters": new_parameters} for key in ("is_encoder", "may_be_missing")}
    true = {question for question in QUESTIONS if getattr(parameters, question)(name, **of_task.get(question, {}))}
    assert true == NAMES[name]


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("embed.cls_token", 0),
        ("blocks.layers.0.norm1.weight", 1),
        ("blocks.layers.11.mlp.fc2.bias", 12),
        ("blocks.final_layernorm.weight", 13),
        ("head.out.weight", 13),
        ("mae_decoder.blocks.layers.3.norm1.weight", 13),
    ],
)
def test_depth_counts_the_embedding_as_0_and_what_follows_the_layers_as_one_more(name, depth):
    assert parameters.layer_depth(name, num_layers=12) == depth


def test_a_layers_number_is_read_and_replaced_in_the_encoder_alone():
    assert parameters.local_layer("blocks.layers.3.attn.qkv.weight") == 3
    assert parameters.with_layer("blocks.layers.3.attn.qkv.weight", 10) == "blocks.layers.10.attn.qkv.weight"
    assert parameters.local_layer("mae_decoder.blocks.layers.3.attn.qkv.weight") is None
