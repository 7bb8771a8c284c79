"""Map NVIDIA NeMo's parameter names to timm's (see `param_mapping.py`), for its ViT with 8 class tokens until NeMo 2.

NeMo orders a patch's values row, column, channel, and queries, keys and values head by head, as megavit does.

Shapes: H hidden, C channels, p patch side, V = p²·C, N tokens.
"""

import re

from torch import Tensor

from megavit.checkpoint.param_mapping import Dims, ParamMapping, find_row, heads_to_parts, parts_to_heads

# Prefix of every name in a written file; models trained with O2 have further prefixes.
PREFIX = "model."
_PREFIXES = re.compile(r"^(?:model\.|module\.)*")


def _to_patch(weight_HV: Tensor, dims: Dims) -> Tensor:
    p = dims.patch_size
    return weight_HV.unflatten(1, (p, p, -1)).movedim(3, 1)


def _from_patch(weight_HCpp: Tensor, dims: Dims) -> Tensor:
    return weight_HCpp.movedim(1, 3).flatten(1)


def _add_batch(weight_NH: Tensor, dims: Dims) -> Tensor:
    return weight_NH.unsqueeze(0)


def _drop_batch(weight_1NH: Tensor, dims: Dims) -> Tensor:
    return weight_1NH.squeeze(0)


_LAYER, _PLAIN_LAYER = "backbone.transformer.layers.#", "blocks.#"

TABLE = (
    ParamMapping("backbone.cls_token", "cls_token"),
    ParamMapping("backbone.position_embeddings.weight", "pos_embed", _add_batch, _drop_batch),
    ParamMapping("backbone.linear_encoder.weight", "patch_embed.proj.weight", _to_patch, _from_patch),
    ParamMapping("backbone.linear_encoder.bias", "patch_embed.proj.bias"),
    *(
        ParamMapping(f"{theirs}.{leaf}", f"{timm_name}.{leaf}")
        for leaf in ("weight", "bias")
        for theirs, timm_name in (
            (f"{_LAYER}.input_layernorm", f"{_PLAIN_LAYER}.norm1"),
            (f"{_LAYER}.self_attention.dense", f"{_PLAIN_LAYER}.attn.proj"),
            (f"{_LAYER}.post_attention_layernorm", f"{_PLAIN_LAYER}.norm2"),
            (f"{_LAYER}.mlp.dense_h_to_4h", f"{_PLAIN_LAYER}.mlp.fc1"),
            (f"{_LAYER}.mlp.dense_4h_to_h", f"{_PLAIN_LAYER}.mlp.fc2"),
            ("backbone.transformer.final_layernorm", "norm"),
        )
    ),
    *(
        ParamMapping(
            f"{_LAYER}.self_attention.query_key_value.{leaf}",
            f"{_PLAIN_LAYER}.attn.qkv.{leaf}",
            heads_to_parts,
            parts_to_heads,
        )
        for leaf in ("weight", "bias")
    ),
)

# The head of pre-training, and the head of fine-tuning.
_TWO_MATRICES = (("head.dense_in", "pre_logits.0"), ("head.dense_out", "head"))
_ONE_MATRIX = (("head", "head"),)


def table(*, two_matrices: bool) -> tuple[ParamMapping, ...]:
    """Return the rows of a model with one or two matrices in its head."""
    heads = _TWO_MATRICES if two_matrices else _ONE_MATRIX
    return (*TABLE, *(ParamMapping(f"{a}.{leaf}", f"{b}.{leaf}") for leaf in ("weight", "bias") for a, b in heads))


def bare(name: str) -> str:
    """Return a NeMo name without the prefixes of wrappers."""
    return _PREFIXES.sub("", name)


def nemo_row(timm_name: str, *, two_matrices: bool) -> tuple[ParamMapping, str]:
    """Return the row of a timm name, and NeMo's name.

    Raises:
        KeyError: if NeMo's model has no such part.
    """
    row, layer = find_row({row.timm_name: row for row in table(two_matrices=two_matrices)}, timm_name)
    return row, row.name.replace("#", layer)
