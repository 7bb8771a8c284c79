"""Mix training images with their neighbours by mixup and cutmix, and their labels with the neighbours' labels.

Shapes: B images, C channels, Y rows, X columns, K classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.transforms.random_erasing import Boxes
from megavit.parallel.rng import RandomStream, drawn_from, uniform

_STREAMS = (
    RandomStream.MIX_WHETHER,
    RandomStream.MIX_WHICH,
    RandomStream.MIX_SHARE,
    RandomStream.MIX_DOWN,
    RandomStream.MIX_ACROSS,
)
_QUANTILES = 2**16


class MixParams(NamedTuple):
    """The parameters with which a batch is mixed, on the CPU.

    Attributes:
        share_B: float64 weight of the image and of its label; the neighbour has the rest.
        boxes: box that is pasted from the neighbour; empty if the images are blended or not mixed.
        cut_B: bool, True if a box is pasted.
    """

    share_B: Tensor
    boxes: Boxes
    cut_B: Tensor

    def images(self, images_BCYX: Tensor) -> Tensor:
        """Return normalised images_BCYX, mixed."""
        device, (_, _, height, width) = images_BCYX.device, images_BCYX.shape
        blended_B = torch.where(self.cut_B, 1.0, self.share_B).float().to(device, non_blocking=True)
        inside_B1YX = self.boxes.inside(height, width, device=device)
        own_B1YX = torch.where(inside_B1YX, 0.0, blended_B.view(-1, 1, 1, 1))
        # Not torch.lerp, whose rounding depends on torch's implementation.
        return images_BCYX * own_B1YX + neighbours(images_BCYX) * (1 - own_B1YX)

    def targets(self, targets_BK: Tensor) -> Tensor:
        """Return the class probabilities targets_BK, mixed."""
        share_B1 = self.share_B.float().to(targets_BK.device, non_blocking=True).unsqueeze(1)
        return targets_BK * share_B1 + neighbours(targets_BK) * (1 - share_B1)


class MixupCutmix:
    """Mix each image with the other one of its pair: positions 2i and 2i + 1 of the training order.

    Micro batches have even sizes and start at even positions, so a pair is never divided, and an image's neighbour does
    not depend on the layout. The parameters are a function of the image's key and the seed: the first pipeline stage
    mixes the images and the last one the labels, without communication. Each image samples its own weight, as in timm's
    mode `elem`. timm's default samples one weight per batch, which would make images depend on their batch.

    Args:
        config: the data group, with mixup or cutmix.
        seed: `run.seed`.

    Source: arXiv 1710.09412 (mixup), arXiv 1905.04899 (cutmix); timm/data/mixup.py.
    """

    def __init__(self, config: DataConfig, *, seed: int) -> None:
        self.seed, self.prob = seed, config.mixup_prob
        self.height, self.width = config.image_size
        self.cut_share = config.mixup_switch_prob
        if config.mixup is None or config.cutmix is None:
            self.cut_share = float(config.mixup is None)
        self.blends, self.cuts = (
            None if alpha is None else beta_quantiles(alpha) for alpha in (config.mixup, config.cutmix)
        )

    def draw(self, batch: Batch) -> MixParams:
        """Sample the parameters with which to mix this batch."""
        ids, epochs, occurrences = (column.unsqueeze(1) for column in batch.key_columns())
        streams = torch.tensor(_STREAMS)
        whether_B, which_B, share_B, down_B, across_B = uniform(self.seed, epochs, ids, occurrences, streams).unbind(1)
        mixed_B, cut_B = whether_B < self.prob, which_B < self.cut_share
        own_B = torch.ones_like(share_B)
        if self.blends is not None:
            own_B = own_B.where(cut_B, drawn_from(self.blends, share_B))
        if self.cuts is not None:
            own_B = own_B.where(~cut_B, drawn_from(self.cuts, share_B))
        own_B, cut_B = own_B.where(mixed_B, 1.0), cut_B & mixed_B
        boxes = self._boxes(own_B.where(cut_B, 1.0), down_B, across_B)
        area_B = (boxes.bottom - boxes.top) * (boxes.right - boxes.left)
        # The image's edge may cut the box; the labels' weights follow the pixels that are actually pasted.
        left_B = 1 - area_B / (self.height * self.width)
        return MixParams(left_B.where(cut_B, own_B), boxes, cut_B)

    def _boxes(self, own_B: Tensor, down_B: Tensor, across_B: Tensor) -> Boxes:
        """Return boxes with the image's aspect ratio and the neighbour's weight as area, at random centres."""
        side_B = (1 - own_B).sqrt()
        edges = []
        for size, place_B in ((self.height, down_B), (self.width, across_B)):
            length_B = (side_B * size).long()
            start_B = (place_B * size).long() - length_B // 2
            edges.append((start_B.clamp(0, size), (start_B + length_B).clamp(0, size)))
        (top, bottom), (left, right) = edges
        return Boxes(top, left, bottom, right)


def neighbours(rows: Tensor) -> Tensor:
    """Return the rows in the order 1, 0, 3, 2, …: each row's place has the other row of its pair."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def beta_quantiles(alpha: float) -> Tensor:
    """Return 65,536 equally likely values of Beta(α, α), float64: its quantiles at (k + ½) / 65,536.

    The distribution function is integrated over s with x = s^p and p = max(1, 1/α), which removes the pole at 0, and
    mirrored at ½.
    """
    power = max(1.0, 1 / alpha)
    s = np.linspace(0, 0.5 ** (1 / power), 2**17)
    x = s**power
    # Rounding must not make a power of 0 negative, which would be a pole.
    density = s ** max(0.0, power * alpha - 1) * (1 - x) ** (alpha - 1)
    until = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    probabilities = (np.arange(_QUANTILES // 2) + 0.5) / _QUANTILES
    low = np.interp(probabilities, until / (2 * until[-1]), s) ** power
    return torch.from_numpy(np.concatenate([low, 1 - low[::-1]]))
