"""Change colour and geometry of uint8 training images at random, with torchvision's operations.

All of them sample from torch's default generator, which `ImageTransform` seeds for each image.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from megavit.data.augment_config import AutoAugment
from megavit.data.config import DataConfig

# Number of magnitudes, which sets a resolution of 0.01.
_BINS = 1001
_MAX_MAGNITUDE = 10


def colour_transforms(config: DataConfig) -> list[Callable[[Tensor], Tensor]]:
    """Return the transforms that `data.auto_augment` and `data.color_jitter` name, in the order of their use."""
    chosen: list[Callable[[Tensor], Tensor]] = []
    # Pixels outside a rotated or translated image take the mean colour, as in timm.
    turned = {"interpolation": InterpolationMode.BILINEAR, "fill": [round(255 * mean) for mean in config.mean]}
    if config.auto_augment is AutoAugment.autoaugment:
        chosen.append(v2.AutoAugment(**turned))
    if config.auto_augment is AutoAugment.trivialaugment:
        chosen.append(v2.TrivialAugmentWide(**turned))
    if config.auto_augment is AutoAugment.randaugment:
        chosen.append(RandAugment(config, **turned))
    if config.auto_augment is AutoAugment.three_augment:
        chosen.append(_three_augment(min(config.image_size)))
    if config.color_jitter is not None:
        brightness, contrast, saturation, hue = config.color_jitter
        chosen.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    return chosen


class RandAugment:
    """Apply a few operations, sampled uniformly with replacement, each at its own random magnitude.

    The operations are torchvision's 14, one of which is the identity, in torchvision's ranges. A magnitude m is m/10 of
    the range: 10 rotates by 30 degrees, shears by 0.3, translates by 45% of the side, changes brightness, colour,
    contrast and sharpness by 0.9, keeps 4 of 8 bits and solarises everything. A larger m makes each operation stronger
    (timm's `inc1`). torchvision's own `magnitude=9` differs: it is 9 of 30.

    Differences from timm: the identity is among the operations, `Invert` and `SolarizeAdd` are not, and posterize keeps
    8 − 0.4 m bits, as in the paper, instead of 4 − 0.4 m.

    Args:
        config: the data group.
        turned: torchvision's arguments for rotation and translation: interpolation and fill colour.

    Source: arXiv 1909.13719; the standard deviation of the magnitude is timm's, timm/data/auto_augment.py.
    """

    def __init__(self, config: DataConfig, **turned: object) -> None:
        self.num_ops, self.prob = config.randaugment_ops, config.randaugment_prob
        self.magnitude, self.std = config.randaugment_magnitude, config.randaugment_magnitude_std
        self.one = v2.RandAugment(num_ops=1, num_magnitude_bins=_BINS, **turned)

    def __call__(self, image: Tensor) -> Tensor:
        for _ in range(self.num_ops):
            if self.prob < 1 and torch.rand(()) >= self.prob:
                continue
            strength = self.magnitude + self.std * float(torch.randn(()))
            share = min(max(strength / _MAX_MAGNITUDE, 0.0), 1.0)
            self.one.magnitude = round(share * (_BINS - 1))
            image = self.one(image)
        return image


def _three_augment(side: int) -> v2.Transform:
    """Return a transform that makes an image grey, solarises or blurs it.

    Source: arXiv 2204.07118, section 3.4; the threshold and the blur's standard deviations are DeiT's, augment.py.
    """
    # The kernel reaches three standard deviations of the widest blur, but edges are mirrored: it must fit the image.
    reach = max(0, min(6, side - 1))
    return v2.RandomChoice(
        [
            v2.Grayscale(num_output_channels=3),
            v2.RandomSolarize(threshold=128, p=1.0),
            v2.GaussianBlur(kernel_size=2 * reach + 1, sigma=(0.1, 2.0)),
        ]
    )
