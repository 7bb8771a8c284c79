"""Describe another library's preprocessing of images as settings of the data group."""

import math
from dataclasses import dataclass

from megavit.data.config import PIXEL_SETTINGS, Interpolation

# Used by facebookresearch/mae, timm's DeiT and NeMo.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Pixels:
    """Preprocessing of images, as settings of the data group.

    Attributes:
        mean, std: mean and standard deviation per channel, for values in [0, 1].
        crop_pct: fraction of the resized image that the centre crop keeps; None for no crop.
        interpolation: interpolation of the resizing.
        assumed: those of `PIXEL_SETTINGS` that the files do not state.
    """

    mean: list[float]
    std: list[float]
    crop_pct: float | None
    interpolation: Interpolation = Interpolation.bicubic
    assumed: tuple[str, ...] = ()


def assumed_pixels(channels: int, *, crop_pct: float | None, interpolation: Interpolation) -> Pixels:
    """Return the normalisation to [-1, 1], which most of timm's and Google's ViTs use."""
    return Pixels([0.5] * channels, [0.5] * channels, crop_pct, interpolation, PIXEL_SETTINGS)


def imagenet_pixels(channels: int, *, crop_pct: float | None) -> Pixels:
    """Return ImageNet's mean and standard deviation; their average for images without three channels."""
    mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    if channels != len(mean):
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
        return Pixels(mean, std, crop_pct, assumed=("data.mean", "data.std"))
    return Pixels(mean, std, crop_pct)


def crop_share(side: int, shorter: int) -> float:
    """Return the `data.crop_pct` for a centre crop of `side` pixels from images with a shorter side of `shorter`.

    Evaluation resizes to floor(side / crop_pct). Several values give `shorter`; the one with the fewest decimals is
    returned: 0.875 for 224 of 256, 0.9 for 224 of 248.
    """
    for decimals in range(1, 16):
        share = math.floor(side / shorter * 10**decimals) / 10**decimals
        if share > 0 and math.floor(side / share) == shorter:
            return share
    return side / (shorter + 0.5)
