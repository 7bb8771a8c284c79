"""Describe another library's model: its sizes as a `ModelConfig`, its weights by timm's names."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megavit.checkpoint.convert.hf_mapping import NameMapping
from megavit.checkpoint.convert.pixels import Pixels
from megavit.checkpoint.convert.tensor_files import TensorFiles
from megavit.checkpoint.param_mapping import TABLE
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Pool, Positions
from megavit.model.layers.pos_embed import sincos_positions
from megavit.validation import format_value

# (width, layers): heads. Weights do not show the number of heads; sizes not listed here have heads of width 64.
_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16, (1152, 27): 16}

# Weights of other libraries that the network does not use.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "vit.pooler.dense.weight", "vit.pooler.dense.bias")


@dataclass
class ExternalModel:
    """A model of another library.

    Attributes:
        model: the model's sizes, as a model group.
        image_size: [height, width] in pixels.
        channels: channels of an image.
        classes: class names, in the order of the scores; empty for a masked autoencoder or a model without a head.
        files: files with the weights.
        mapping: mapping from timm's names to the names in the files.
        pixels: the model's preprocessing of images.
        assumed: settings of the model group that the files do not state, each with a description of the assumption.
        notes: lines for the user.
        other_pooling: description of the classifier's pooling if megavit's head does not support it; else None.
        decoder: sizes of a masked autoencoder's decoder, as settings of the task group.
    """

    model: ModelConfig
    image_size: list[int]
    channels: int
    classes: list[str]
    files: TensorFiles
    mapping: NameMapping
    pixels: Pixels
    assumed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    other_pooling: str | None = None
    decoder: dict[str, Any] = field(default_factory=dict)

    def assumptions(self, *, typed: Iterable[str] = ()) -> list[str]:
        """Describe assumed settings that the files do not state: one line for the network and one for the pixels.

        Args:
            typed: settings given by the user.
        """
        lines, taken = [], set(typed)
        words = [word for key, word in self.assumed.items() if key not in taken]
        if words:
            lines.append(f"assumed: {', '.join(words)}")
        pixels = [key for key in self.pixels.assumed if key not in taken]
        if pixels:
            lines.append(f"assumed: {', '.join(pixels)}; set those that are wrong")
        return lines

    def weight(self, timm_name: str) -> Tensor:
        """Return one weight by timm's name.

        Raises:
            ConfigError: if it is missing.
        """
        try:
            return self.mapping.weight(timm_name)
        except KeyError as error:
            raise ConfigError(f"the model has no weight {error}, which {timm_name} needs") from error

    def unread(self, wanted: Iterable[str]) -> list[str]:
        """Return the names in the files that no wanted weight is read from."""
        fixed = ["decoder_pos_embed"] if self.decoder else []
        if self.model.positions is Positions.sincos:
            fixed.append("pos_embed")
        used = {name for timm_name in (*wanted, *fixed) for name in self.mapping.names(timm_name)}
        return sorted(name for name in self.files if name not in used and name not in _UNUSED)

    def unknown(self) -> list[str]:
        """Return the names in the files for which megavit's network has no parameter with any head."""
        layers, decoder = self.model.num_layers, self.decoder.get("decoder_num_layers", 0)
        known = []
        for row in TABLE:
            count = 1 if "#" not in row.timm_name else decoder if row.timm_name.startswith("decoder_") else layers
            known += [row.timm_name.replace("#", str(layer)) for layer in range(count)]
        return self.unread(timm_name for timm_name in known if self._is_mapped(timm_name))

    def _is_mapped(self, timm_name: str) -> bool:
        try:
            return bool(self.mapping.names(timm_name))
        except ConfigError:
            # The library's model has no such part.
            return False


def usual_heads(width: int, layers: int) -> int:
    """Return the usual number of heads for a width and a number of layers."""
    return _HEADS.get((width, layers), max(1, width // 64))


def network_words(model: ModelConfig) -> dict[str, str]:
    """Describe each setting that weights alone do not determine."""
    pooled = "class token" if model.pool is Pool.cls else "mean of the patches"
    heads = f"{model.num_heads} head{'s' if model.num_heads > 1 else ''}"
    eps = f"eps {model.norm_eps:g}".replace("e-0", "e-")
    return {"model.num_heads": heads, "activation": "GELU", "model.norm_eps": eps, "model.pool": pooled}


def written(key: str, value: Any) -> str:
    """Return a setting as on the command line."""
    text = str(format_value(value)).lower() if isinstance(value, bool) else str(format_value(value))
    return f"{key}={text}".replace(" ", "")


def are_sincos(positions_NH: Tensor, grid: tuple[int, int], *, class_tokens: int) -> bool:
    """Return whether positions are those of `sincos_positions`, which other libraries store as weights."""
    if positions_NH.shape[1] % 4:
        return False
    ours_NH = sincos_positions(grid, positions_NH.shape[1], class_tokens=class_tokens)
    # Other libraries compute them in another precision and order.
    return torch.allclose(positions_NH.float(), ours_NH, atol=1e-5)


def choose_positions(external: ExternalModel) -> None:
    """Set a masked autoencoder's `model.positions`; its decoder's positions must be sine and cosine."""
    grid, tokens = external.model.patch_grid(external.image_size), external.model.class_tokens
    if are_sincos(external.weight("pos_embed")[0], grid, class_tokens=tokens):
        external.model.positions = Positions.sincos
    if not are_sincos(external.weight("decoder_pos_embed")[0], grid, class_tokens=tokens):
        raise ConfigError("the decoder's positions are not the sine-cosine embedding that megavit's decoder always has")
