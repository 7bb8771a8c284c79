"""A model of another library: its sizes as ours, its weights by plain name."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megavit.checkpoint.foreign import Spelling
from megavit.checkpoint.names import TABLE
from megavit.errors import ConfigError
from megavit.exchange.tensor_files import TensorFiles
from megavit.model.config import ModelConfig, Positions

# timm's and Hugging Face's default for ViT.
_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# MAE's and NeMo's.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Heads cannot be seen in the weights: width and layers tell the named sizes; others have heads of 64.
_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16}

# What theirs has and the network does not need.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "vit.pooler.dense.weight", "vit.pooler.dense.bias")


@dataclass
class ForeignModel:
    """A model of another library.

    Attributes:
        model: its sizes, as ours.
        image_size: [height, width] in pixels.
        channels: of an image.
        mean, std: per channel.
        classes: names, in the order of the scores; empty of a masked autoencoder or a model without a head.
        assumes: what its files do not tell and was taken as usual, in words.
        decoder: a masked autoencoder's other sizes: settings of the task group.
        weights: by plain name, read when asked for.
        names: the plain names that there are.
    """

    model: ModelConfig
    image_size: list[int]
    channels: int
    classes: list[str]
    files: TensorFiles
    spelling: Spelling
    mean: list[float] = field(default_factory=lambda: list(_MEAN))
    std: list[float] = field(default_factory=lambda: list(_STD))
    assumes: str = ""
    decoder: dict[str, Any] = field(default_factory=dict)

    def assume_normalisation(self) -> None:
        """Take images in [-1, 1], as most of timm's ViTs and Google's take them."""
        self.mean, self.std = [0.5] * self.channels, [0.5] * self.channels
        self.assumes = (
            f"how images were normalised is not told: data.mean={self.mean} and data.std={self.std} are taken, type "
            f"others where they are wrong"
        )

    def weight(self, plain: str) -> Tensor:
        """One weight by its plain name.

        Raises:
            ConfigError: if it is not there.
        """
        try:
            return self.spelling.weight(plain)
        except KeyError as error:
            raise ConfigError(f"the model has no weight {error}, which {plain} is made of") from error

    def unread(self, wanted: Iterable[str]) -> list[str]:
        """Their names that none of the wanted plain ones is made of."""
        fixed = ["decoder_pos_embed"] if self.decoder else []
        if self.model.positions is Positions.sincos:
            fixed.append("pos_embed")
        used = {name for plain in (*wanted, *fixed) for name in self.spelling.names(plain)}
        return sorted(name for name in self.files if name not in used and name not in _UNUSED)

    def unknown(self) -> list[str]:
        """Their names that no network of ours has a place for, whatever stands on its encoder."""
        layers, decoder = self.model.num_layers, self.decoder.get("decoder_num_layers", 0)
        known = []
        for row in TABLE:
            count = 1 if "#" not in row.plain else decoder if row.plain.startswith("decoder_") else layers
            known += [row.plain.replace("#", str(layer)) for layer in range(count)]
        return self.unread(plain for plain in known if self._is_spelled(plain))

    def _is_spelled(self, plain: str) -> bool:
        try:
            return bool(self.spelling.names(plain))
        except ConfigError:
            # Theirs has no such part at all.
            return False


def usual_heads(width: int, layers: int) -> int:
    """How many heads a model of these sizes has where nobody says."""
    return _HEADS.get((width, layers), max(1, width // 64))
