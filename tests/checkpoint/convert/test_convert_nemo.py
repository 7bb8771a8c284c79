"""Test conversions from and to NVIDIA NeMo: bit-equal round trips, and the logits of NeMo's computation."""

import pytest
import torch

from tests.checkpoint.convert.test_convert import assert_same, logits_at, megavit
from tests.distributed import run_ranks


def nemo_weights(*, two_matrices: bool) -> dict[str, torch.Tensor]:
    """Return NeMo's weights of a ViT: width 48, 4 heads, 2 layers, 9 patches of 8×8×3, 8 class tokens, 5 classes."""
    width, ffn, draw = 48, 80, torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 8, width), "position_embeddings.weight": (17, width), "linear_encoder": (width, 192)}
    for layer in range(2):
        for part, shape in {
            "input_layernorm": (width,),
            "self_attention.query_key_value": (3 * width, width),
            "self_attention.dense": (width, width),
            "post_attention_layernorm": (width,),
            "mlp.dense_h_to_4h": (ffn, width),
            "mlp.dense_4h_to_h": (width, ffn),
        }.items():
            shapes[f"transformer.layers.{layer}.{part}"] = shape
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()}
    shapes["backbone.transformer.final_layernorm"] = (width,)
    heads = {"head.dense_in": (width, width), "head.dense_out": (5, width)} if two_matrices else {"head": (5, width)}
    weights = {}
    for name, shape in (shapes | heads).items():
        full = name.endswith(("cls_token", ".weight"))
        for leaf in [""] if full else [".weight", ".bias"]:
            weights[f"model.{name}{leaf}"] = torch.randn(shape[:1] if leaf == ".bias" else shape, generator=draw) / 4
    return weights


def nemo_scores(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Compute NeMo's logits with code that follows its source; NeMo itself does not run here."""
    names = {name.removeprefix("model.").removeprefix("backbone."): weight for name, weight in weights.items()}

    def linear(name, x):
        return x @ names[f"{name}.weight"].T + names[f"{name}.bias"]

    def norm(name, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], names[f"{name}.weight"], names[f"{name}.bias"], 1e-5)

    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # B C y x p1 p2
    x = linear("linear_encoder", patches.permute(0, 2, 3, 4, 5, 1).reshape(len(images), 9, 192))
    x = torch.cat([names["cls_token"].expand(len(images), -1, -1), x], dim=1) + names["position_embeddings.weight"]
    for layer in ("transformer.layers.0.", "transformer.layers.1."):
        qkv = linear(f"{layer}self_attention.query_key_value", norm(f"{layer}input_layernorm", x))
        q, k, v = qkv.unflatten(2, (4, 36)).transpose(1, 2).chunk(3, dim=3)  # each head's own three
        mixed = ((q @ k.transpose(2, 3)) / 12**0.5).softmax(dim=3) @ v
        x = x + linear(f"{layer}self_attention.dense", mixed.transpose(1, 2).flatten(2))
        hidden = linear(f"{layer}mlp.dense_h_to_4h", norm(f"{layer}post_attention_layernorm", x))
        x = x + linear(f"{layer}mlp.dense_4h_to_h", torch.nn.functional.gelu(hidden))
    pooled = norm("transformer.final_layernorm", x)[:, 0]
    if "head.weight" in names:
        return linear("head", pooled)
    return linear("head.dense_out", linear("head.dense_in", pooled).tanh())


@pytest.mark.parametrize("two_matrices", [True, False])
def test_nemos_state_dict_comes_back_to_the_bit_and_gives_the_same_logits(two_matrices, tmp_path, figure):
    weights = nemo_weights(two_matrices=two_matrices)
    # As O2 wraps it.
    wrapped = {name.replace("model.", "model.module.", 1): weight for name, weight in weights.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "nemo.ckpt")
    megavit("convert", f"from=nemo:{tmp_path / 'nemo.ckpt'}", f"to={tmp_path / 'run'}", "num_heads=4")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=nemo:{tmp_path / 'back.ckpt'}")
    assert_same(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], weights)
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    for world in (1, 2):
        got = run_ranks(logits_at, world, str(tmp_path / "run"), images)[0]
        difference = float((got - nemo_scores(weights, images)).abs().max())
        figure(
            f"NeMo's ViT, {'two matrices' if two_matrices else 'one'}, TP {world}: largest |Δlogit| {difference:.1e}"
        )
        assert difference < 1e-5
