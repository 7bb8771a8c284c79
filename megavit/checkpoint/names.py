"""megavit's weight names and the plain model's (timm's), as one two-sided table.

Shapes: H hidden, A heads, D head width, C channels, p patch side, V = C·p², K class tokens, N tokens.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dims:
    """What the transforms need to know of a model."""

    num_heads: int
    patch_size: int


def _same(weight: Tensor, dims: Dims) -> Tensor:
    return weight


def _flat_to_patch(weight_HV: Tensor, dims: Dims) -> Tensor:
    p = dims.patch_size
    return weight_HV.reshape(weight_HV.shape[0], -1, p, p)


def _patch_to_flat(weight_HCpp: Tensor, dims: Dims) -> Tensor:
    return weight_HCpp.flatten(1)


def _swap_first_two(weight: Tensor, dims: Dims) -> Tensor:
    return weight.transpose(0, 1)


def _heads_to_parts(weight: Tensor, dims: Dims) -> Tensor:
    """Rows head by head (query, key, value of each) to all queries, all keys, all values."""
    rows = weight.unflatten(0, (dims.num_heads, 3, -1))
    return rows.transpose(0, 1).flatten(0, 2)


def _parts_to_heads(weight: Tensor, dims: Dims) -> Tensor:
    rows = weight.unflatten(0, (3, dims.num_heads, -1))
    return rows.transpose(0, 1).flatten(0, 2)


Transform = Callable[[Tensor, Dims], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table; `#` stands for the layer's number, counted from 0 over the whole model."""

    ours: str
    plain: str
    to_plain: Transform = _same
    from_plain: Transform = _same


TABLE = (
    Row("embed.proj.weight", "patch_embed.proj.weight", _flat_to_patch, _patch_to_flat),
    Row("embed.proj.bias", "patch_embed.proj.bias"),
    Row("embed.cls_token", "cls_token", _swap_first_two, _swap_first_two),
    Row("embed.pos_embed", "pos_embed", _swap_first_two, _swap_first_two),
    *(
        Row(f"blocks.layers.#.{ours}.{leaf}", f"blocks.#.{plain}.{leaf}")
        for leaf in ("weight", "bias")
        for ours, plain in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("attn.q_layernorm", "attn.q_norm"),
            ("attn.k_layernorm", "attn.k_norm"),
            ("attn.proj", "attn.proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
    ),
    *(
        Row(f"blocks.layers.#.attn.qkv.{leaf}", f"blocks.#.attn.qkv.{leaf}", _heads_to_parts, _parts_to_heads)
        for leaf in ("weight", "bias")
    ),
    Row("blocks.layers.#.residual1.gamma", "blocks.#.ls1.gamma"),
    Row("blocks.layers.#.residual2.gamma", "blocks.#.ls2.gamma"),
    *(
        Row(f"{ours}.{leaf}", f"{plain}.{leaf}")
        for leaf in ("weight", "bias")
        for ours, plain in (
            ("blocks.final_layernorm", "norm"),
            ("head.fc_norm", "fc_norm"),
            ("head.pre", "pre_logits.0"),
            ("head.out", "head"),
        )
    ),
)


def to_plain(weights: dict[str, Tensor], dims: Dims) -> dict[str, Tensor]:
    """Rename and reshape whole weights of ours to the plain model's.

    Raises:
        KeyError: for a name that is not in the table.
    """
    table = {row.ours: row for row in TABLE}
    renamed = {}
    for name, weight in weights.items():
        row, layer = _find(table, name)
        renamed[row.plain.replace("#", layer)] = row.to_plain(weight, dims)
    return renamed


def from_plain(weights: dict[str, Tensor], dims: Dims) -> dict[str, Tensor]:
    """The inverse of `to_plain`."""
    table = {row.plain: row for row in TABLE}
    renamed = {}
    for name, weight in weights.items():
        row, layer = _find(table, name)
        renamed[row.ours.replace("#", layer)] = row.from_plain(weight, dims)
    return renamed


def _find(table: dict[str, Row], name: str) -> tuple[Row, str]:
    number = re.search(r"\.(\d+)\.(?=\w)", name) if name.startswith("blocks.") else None
    layer = number.group(1) if number else ""
    pattern = name.replace(f".{layer}.", ".#.", 1) if number else name
    return table[pattern], layer
