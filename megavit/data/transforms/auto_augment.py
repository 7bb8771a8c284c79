"""Colours and shapes of a training image changed at random: operations of torchvision's, on uint8.

All they draw comes from torch's default generator, which `ImageTransform` seeds for each image.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from megavit.data.augment_config import AutoAugment
from megavit.data.config import DataConfig

# Strengths are told apart to a hundredth.
_BINS = 1001
_MAX_MAGNITUDE = 10


def colour_transforms(config: DataConfig) -> list[Callable[[Tensor], Tensor]]:
    """What `data.auto_augment` and `data.color_jitter` name, in the order in which an image passes it."""
    chosen: list[Callable[[Tensor], Tensor]] = []
    # What a turned or moved image leaves free takes the mean colour, as in timm.
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
    """A few operations, drawn with equal chances and with replacement, each at a strength of its own.

    They are torchvision's 14, one of which changes nothing, in its own ranges: a magnitude m is m/10 of the range, so
    that 10 turns by 30 degrees, shears by 0.3, moves by 45% of the side, changes brightness, colour, contrast and
    sharpness by 0.9, keeps 4 of 8 bits and solarises everything. The larger m, the stronger each of them is (timm's
    `inc1`). torchvision's own `magnitude=9` is another: 9 of 30.

    Beside timm's: there is an operation that changes nothing, no inversion and no `SolarizeAdd`; 8 − 0.4 m bits are
    kept, as in the paper, where timm's keeps 4 − 0.4 m.

    Args:
        config: the data group.
        turned: how images are turned and moved, for torchvision.

    Source: arXiv 1909.13719; the deviation is timm's, timm/data/auto_augment.py.
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
    """Grey, solarised or blurred.

    Source: arXiv 2204.07118, section 3.4; the threshold and the blur's deviations are DeiT's, augment.py.
    """
    # Three deviations of the widest blur to each side; the edge is mirrored, so no more than there is.
    reach = max(0, min(6, side - 1))
    return v2.RandomChoice(
        [
            v2.Grayscale(num_output_channels=3),
            v2.RandomSolarize(threshold=128, p=1.0),
            v2.GaussianBlur(kernel_size=2 * reach + 1, sigma=(0.1, 2.0)),
        ]
    )
