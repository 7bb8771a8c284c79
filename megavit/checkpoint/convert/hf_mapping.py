"""Map other libraries' weight names to timm's (see `param_mapping.py`) and back, with one table per format.

facebookresearch/mae uses timm's names; Hugging Face stores queries, keys and values separately and has other names.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavit.checkpoint.convert.nemo_mapping import bare, nemo_row
from megavit.checkpoint.param_mapping import Dims
from megavit.errors import ConfigError

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class HfRow:
    """One row: timm's name, and Hugging Face's names, whose weights are concatenated along the rows.

    `#` is the layer's number.
    """

    timm_name: str
    theirs: tuple[str, ...]


def _hf_layers(timm_name: str, theirs: str) -> list[HfRow]:
    parts = {
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
        "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attn.proj": ("attention.output.dense",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
    }
    return [
        HfRow(f"{timm_name}.#.{part}.{leaf}", tuple(f"{theirs}.#.{name}.{leaf}" for name in names))
        for part, names in parts.items()
        for leaf in ("weight", "bias")
    ]


HF_TABLE = (
    HfRow("cls_token", ("vit.embeddings.cls_token",)),
    HfRow("pos_embed", ("vit.embeddings.position_embeddings",)),
    *_hf_layers("blocks", "vit.encoder.layer"),
    *_hf_layers("decoder_blocks", "decoder.decoder_layers"),
    HfRow("mask_token", ("decoder.mask_token",)),
    HfRow("decoder_pos_embed", ("decoder.decoder_pos_embed",)),
    *(
        HfRow(f"{timm_name}.{leaf}", (f"{theirs}.{leaf}",))
        for timm_name, theirs in (
            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            ("norm", "vit.layernorm"),
            ("head", "classifier"),
            ("decoder_embed", "decoder.decoder_embed"),
            ("decoder_norm", "decoder.decoder_norm"),
            ("decoder_pred", "decoder.decoder_pred"),
        )
        for leaf in ("weight", "bias")
    ),
)
_HF_BY_PLAIN = {row.timm_name: row.theirs for row in HF_TABLE}

# Other spellings in Hugging Face's files: transformers 5's in memory, and its save_pretrained's of a decoder.
_HF_SPELLINGS = (
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def hf_spelling(name: str) -> str:
    """Return a name as the files on the hub spell it, with the prefix `vit.` that a bare ViTModel omits."""
    if name.startswith(("embeddings.", "encoder.", "layers.", "layernorm.")):
        name = f"vit.{name}"
    for pattern, mapping in _HF_SPELLINGS:
        name = re.sub(pattern, mapping, name)
    return name


def hf_names(timm_name: str) -> tuple[str, ...]:
    """Return Hugging Face's names for timm's name, in order.

    Raises:
        ConfigError: if Hugging Face's model has no such part.
    """
    number = re.search(r"blocks\.(\d+)\.", timm_name)
    layer = number.group(1) if number else ""
    theirs = _HF_BY_PLAIN.get(timm_name.replace(f".{layer}.", ".#.", 1) if number else timm_name)
    if theirs is None:
        raise ConfigError(f"Hugging Face's ViT has no weight for {timm_name}; try to=timm:")
    return tuple(name.replace("#", layer) for name in theirs)


def from_hf(read: Read, timm_name: str) -> Tensor:
    """Join Hugging Face's weights to timm's weight."""
    return torch.cat([read(name) for name in hf_names(timm_name)])


def to_hf(timm_name: str, weight: Tensor) -> dict[str, Tensor]:
    """Split timm's weight into Hugging Face's."""
    names = hf_names(timm_name)
    return {name: part.contiguous() for name, part in zip(names, weight.chunk(len(names)), strict=True)}


def join_prefix(read: Read, names: Iterable[str], *, num_patches: int) -> dict[str, Tensor]:
    """Join timm's class and register tokens to one tensor, with positions for each of them.

    Models without positions for those tokens (`no_embed_class`) get zeros, which is equivalent.

    Args:
        read: returns a weight by timm's name.
        names: names of the weights in the files.
        num_patches: patches per image.

    Returns:
        `cls_token` and `pos_embed`, if the model has them.
    """
    there = set(names)
    tokens = [read(name) for name in ("cls_token", "reg_token") if name in there]
    joined = {"cls_token": torch.cat(tokens, dim=1)} if tokens else {}
    if "pos_embed" in there:
        positions = read("pos_embed")
        prefix = sum(token.shape[1] for token in tokens)
        if prefix and positions.shape[1] == num_patches:
            zeros = positions.new_zeros(1, prefix, positions.shape[2])
            positions = torch.cat([zeros, positions], dim=1)
        joined["pos_embed"] = positions
    return joined


def split_prefix(timm_weights: dict[str, Tensor], *, pools_class_token: bool, learned: bool) -> dict[str, Tensor]:
    """Invert `join_prefix`: the first token is the class token if it is pooled; the others are registers.

    Args:
        timm_weights: weights by timm's names; only `cls_token` and `pos_embed` are read.
        pools_class_token: whether the head reads the first token.
        learned: whether positions are learned.
    """
    split: dict[str, Tensor] = {name: timm_weights[name] for name in ("cls_token", "pos_embed") if name in timm_weights}
    tokens = timm_weights.get("cls_token")
    if tokens is None:
        return split
    count = tokens.shape[1]
    registers = count - 1 if pools_class_token else count
    if count == 1:
        registers = 0
    if registers:
        split["reg_token"] = tokens[:, count - registers :].contiguous()
        del split["cls_token"]
        if registers < count:
            split["cls_token"] = tokens[:, : count - registers].contiguous()
    if learned and not timm_weights["pos_embed"][:, :count].any():
        split["pos_embed"] = timm_weights["pos_embed"][:, count:].contiguous()
    return split


class NameMapping(Protocol):
    """Map timm's names to the weights in one library's files."""

    def names(self, timm_name: str) -> tuple[str, ...]:
        """Return the names in the files that a weight is read from; some may be missing."""

    def weight(self, timm_name: str) -> Tensor:
        """Return a weight by timm's name.

        Raises:
            KeyError: if a weight is missing; names it.
        """


class TimmMapping:
    """Mapping for timm and facebookresearch/mae.

    Args:
        read: returns a weight by its name in the files.
        there: the names in the files.
        num_patches: patches per image.
    """

    def __init__(self, read: Read, there: Iterable[str], *, num_patches: int) -> None:
        self._read, self._there, self._num_patches = read, set(there), num_patches

    def names(self, timm_name: str) -> tuple[str, ...]:
        """See `NameMapping`."""
        return ("cls_token", "reg_token") if timm_name == "cls_token" else (timm_name,)

    def weight(self, timm_name: str) -> Tensor:
        """See `NameMapping`."""
        if timm_name in ("cls_token", "pos_embed"):
            return join_prefix(self._read, self._there, num_patches=self._num_patches)[timm_name]
        return self._read(timm_name)


class HfMapping:
    """Mapping for Hugging Face (see `TimmMapping`)."""

    def __init__(self, read: Read, there: Iterable[str]) -> None:
        self._read, self._aliases = read, {hf_spelling(name): name for name in there}

    def names(self, timm_name: str) -> tuple[str, ...]:
        """See `NameMapping`."""
        return tuple(self._aliases.get(name, name) for name in hf_names(timm_name))

    def weight(self, timm_name: str) -> Tensor:
        """See `NameMapping`."""
        return from_hf(lambda name: self._read(self._aliases[name]), timm_name)


class NemoMapping:
    """Mapping for NVIDIA NeMo (see `TimmMapping`).

    Args:
        read: returns a weight by its name in the files.
        there: the names in the files.
        dims: sizes of the model.
        two_matrices: whether the head has two matrices.
    """

    def __init__(self, read: Read, there: Iterable[str], dims: Dims, *, two_matrices: bool) -> None:
        self._read, self._dims, self._two_matrices = read, dims, two_matrices
        self._aliases: Mapping[str, str] = {bare(name): name for name in there}

    def names(self, timm_name: str) -> tuple[str, ...]:
        """See `NameMapping`."""
        try:
            _, name = nemo_row(timm_name, two_matrices=self._two_matrices)
        except KeyError:
            return ()
        return (self._aliases.get(name, name),)

    def weight(self, timm_name: str) -> Tensor:
        """See `NameMapping`."""
        row, name = nemo_row(timm_name, two_matrices=self._two_matrices)
        return row.to_timm(self._read(self._aliases[name]), self._dims)
