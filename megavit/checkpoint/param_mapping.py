"""Map megavit's parameter names to timm's (which published MAE checkpoints use) and back, with one table.

Shapes: H hidden, A heads, D head width, C channels, p patch side, V = C·p², K class tokens, N tokens.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Dims:
    """Sizes of a model that the transforms need; `decoder_heads` is 0 for a model without a decoder."""

    num_heads: int
    patch_size: int
    decoder_heads: int = 0


def _same(weight: Tensor, dims: Dims) -> Tensor:
    return weight


def _flat_to_patch(weight_HV: Tensor, dims: Dims) -> Tensor:
    p = dims.patch_size
    return weight_HV.reshape(weight_HV.shape[0], -1, p, p)


def _patch_to_flat(weight_HCpp: Tensor, dims: Dims) -> Tensor:
    return weight_HCpp.flatten(1)


def _swap_first_two(weight: Tensor, dims: Dims) -> Tensor:
    return weight.transpose(0, 1)


def heads_to_parts(weight: Tensor, dims: Dims) -> Tensor:
    """Reorder rows from (query, key, value) per head to all queries, all keys, all values."""
    rows = weight.unflatten(0, (dims.num_heads, 3, -1))
    return rows.transpose(0, 1).flatten(0, 2)


def parts_to_heads(weight: Tensor, dims: Dims) -> Tensor:
    """Invert `heads_to_parts`."""
    rows = weight.unflatten(0, (3, dims.num_heads, -1))
    return rows.transpose(0, 1).flatten(0, 2)


def _decoder_heads_to_parts(weight: Tensor, dims: Dims) -> Tensor:
    return heads_to_parts(weight, replace(dims, num_heads=dims.decoder_heads))


def _decoder_parts_to_heads(weight: Tensor, dims: Dims) -> Tensor:
    return parts_to_heads(weight, replace(dims, num_heads=dims.decoder_heads))


def _channels_last(weight: Tensor, dims: Dims) -> Tensor:
    """Reorder a patch's values from channel, row, column to row, column, channel."""
    p = dims.patch_size
    return weight.unflatten(0, (-1, p, p)).movedim(0, 2).flatten(0, 2)


def _channels_first(weight: Tensor, dims: Dims) -> Tensor:
    p = dims.patch_size
    return weight.unflatten(0, (p, p, -1)).movedim(2, 0).flatten(0, 2)


Transform = Callable[[Tensor, Dims], Tensor]


@dataclass(frozen=True)
class ParamMapping:
    """One row: a name and timm's name; `#` is the layer's number, from 0 in the full model."""

    name: str
    timm_name: str
    to_timm: Transform = _same
    from_timm: Transform = _same


def _layers(ours: str, timm_name: str, from_heads: Transform, to_heads: Transform) -> list[ParamMapping]:
    """Return the rows of a stack of transformer layers."""
    alike = (
        ("norm1", "norm1"),
        ("norm2", "norm2"),
        ("attn.q_layernorm", "attn.q_norm"),
        ("attn.k_layernorm", "attn.k_norm"),
        ("attn.proj", "attn.proj"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    )
    rows = []
    for leaf in ("weight", "bias"):
        rows += [ParamMapping(f"{ours}.layers.#.{one}.{leaf}", f"{timm_name}.#.{other}.{leaf}") for one, other in alike]
        rows.append(
            ParamMapping(f"{ours}.layers.#.attn.qkv.{leaf}", f"{timm_name}.#.attn.qkv.{leaf}", from_heads, to_heads)
        )
    return rows


TABLE = (
    ParamMapping("embed.proj.weight", "patch_embed.proj.weight", _flat_to_patch, _patch_to_flat),
    ParamMapping("embed.proj.bias", "patch_embed.proj.bias"),
    ParamMapping("embed.cls_token", "cls_token", _swap_first_two, _swap_first_two),
    ParamMapping("embed.pos_embed", "pos_embed", _swap_first_two, _swap_first_two),
    *_layers("blocks", "blocks", heads_to_parts, parts_to_heads),
    *_layers("mae_decoder.blocks", "decoder_blocks", _decoder_heads_to_parts, _decoder_parts_to_heads),
    ParamMapping("mae_decoder.mask_token", "mask_token"),
    ParamMapping("blocks.layers.#.residual1.gamma", "blocks.#.ls1.gamma"),
    ParamMapping("blocks.layers.#.residual2.gamma", "blocks.#.ls2.gamma"),
    *(
        ParamMapping(f"{ours}.{leaf}", f"{timm_name}.{leaf}")
        for leaf in ("weight", "bias")
        for ours, timm_name in (
            ("blocks.final_layernorm", "norm"),
            ("head.fc_norm", "fc_norm"),
            ("head.pre", "pre_logits.0"),
            ("head.out", "head"),
            ("mae_decoder.embed", "decoder_embed"),
            ("mae_decoder.blocks.final_layernorm", "decoder_norm"),
        )
    ),
    *(
        ParamMapping(f"mae_decoder.pred.{leaf}", f"decoder_pred.{leaf}", _channels_last, _channels_first)
        for leaf in ("weight", "bias")
    ),
)


def to_timm_name(name: str) -> str:
    """Return timm's name of a megavit parameter.

    Raises:
        KeyError: for a name that is not in the table.
    """
    row, layer = find_row({row.name: row for row in TABLE}, name)
    return row.timm_name.replace("#", layer)


def to_timm(weights: dict[str, Tensor], dims: Dims) -> dict[str, Tensor]:
    """Rename and reshape megavit's full weights to timm's.

    Raises:
        KeyError: for a name that is not in the table.
    """
    table = {row.name: row for row in TABLE}
    renamed = {}
    for name, weight in weights.items():
        row, layer = find_row(table, name)
        renamed[row.timm_name.replace("#", layer)] = row.to_timm(weight, dims)
    return renamed


def from_timm(weights: dict[str, Tensor], dims: Dims) -> dict[str, Tensor]:
    """Invert `to_timm`."""
    table = {row.timm_name: row for row in TABLE}
    renamed = {}
    for name, weight in weights.items():
        row, layer = find_row(table, name)
        renamed[row.name.replace("#", layer)] = row.from_timm(weight, dims)
    return renamed


def find_row(table: dict[str, ParamMapping], name: str) -> tuple[ParamMapping, str]:
    """Return the row of a name, and the layer's number; an empty string for a weight outside the layers.

    Raises:
        KeyError: for a name that is not in the table.
    """
    number = re.search(r"(?:blocks|layers)\.(\d+)\.", name)
    layer = number.group(1) if number else ""
    pattern = name.replace(f".{layer}.", ".#.", 1) if number else name
    return table[pattern], layer
