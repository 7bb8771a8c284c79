"""Replace boxes in training images by noise, on the training device.

Shapes: B images, R of them erased, T tries, C channels, Y rows, X columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.parallel.rng import RandomStream, drawn_from, normal, uniform

_BOX_STREAMS = (
    RandomStream.ERASE_AREA,
    RandomStream.ERASE_ASPECT,
    RandomStream.ERASE_DOWN,
    RandomStream.ERASE_ACROSS,
)
_TRIES = 10
_AREAS = (0.02, 1 / 3)
_ASPECTS = (0.3, 1 / 0.3)


class Boxes(NamedTuple):
    """One box per image, in pixels; top and left are inside, bottom and right are outside."""

    top: Tensor
    left: Tensor
    bottom: Tensor
    right: Tensor

    def inside(self, height: int, width: int, *, device: torch.device) -> Tensor:
        """Return inside_B1YX, bool, True for pixels in the image's box."""
        top, left, bottom, right = torch.stack(self).to(device, non_blocking=True).view(4, -1, 1, 1, 1).unbind()
        rows, columns = torch.arange(height, device=device).view(-1, 1), torch.arange(width, device=device)
        return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


class Erasing:
    """Replace a box by normal noise in a fraction of the images, as a function of their keys and the seed.

    The box has 0.02 to 1/3 of the area and an aspect ratio of 0.3 to 1/0.3; the first of ten candidates that fits is
    used.

    Args:
        config: the data group.
        seed: `run.seed`.

    Source: arXiv 1708.04896; areas, aspect ratios and noise are timm's, timm/data/random_erasing.py (mode `pixel`).
    """

    def __init__(self, config: DataConfig, *, seed: int) -> None:
        self.share, self.seed = config.random_erasing, seed
        self.height, self.width = config.image_size
        low, high = (math.log(aspect) for aspect in _ASPECTS)
        self.aspects = torch.linspace(low, high, 2**12, dtype=torch.float64).exp()

    def __call__(self, images_BCYX: Tensor, batch: Batch) -> Tensor:
        """Return normalised images_BCYX with erased boxes."""
        rows_R = self.erased(batch)
        if not len(rows_R):
            return images_BCYX
        device, (_, *shape) = images_BCYX.device, images_BCYX.shape
        inside_R1YX = Boxes(*(edge[rows_R] for edge in self.boxes(batch))).inside(
            self.height, self.width, device=device
        )
        ids, epochs, occurrences = (
            column[rows_R].to(device, non_blocking=True).view(-1, 1, 1, 1) for column in batch.key_columns()
        )
        values_CYX = torch.arange(math.prod(shape), device=device).view(shape)
        noise_RCYX = normal(self.seed, epochs, ids, occurrences, RandomStream.ERASE_NOISE, values_CYX)
        rows_R = rows_R.to(device, non_blocking=True)
        return images_BCYX.index_copy(0, rows_R, noise_RCYX.where(inside_R1YX, images_BCYX[rows_R]))

    def erased(self, batch: Batch) -> Tensor:
        """Return the indices of the images to erase, on the CPU."""
        ids_B, epochs_B, occurrences_B = batch.key_columns()
        draws_B = uniform(self.seed, epochs_B, ids_B, occurrences_B, RandomStream.ERASE_WHETHER)
        return (draws_B < self.share).nonzero().flatten()

    def boxes(self, batch: Batch) -> Boxes:
        """Return the box of every image, erased or not, on the CPU; empty if none of ten candidates fits."""
        ids, epochs, occurrences = (column.view(-1, 1) for column in batch.key_columns())
        tries = torch.arange(_TRIES)
        area, aspect, down, across = (
            uniform(self.seed, epochs, ids, occurrences, stream, tries) for stream in _BOX_STREAMS
        )
        pixels = (_AREAS[0] + (_AREAS[1] - _AREAS[0]) * area) * (self.height * self.width)
        proportion = drawn_from(self.aspects, aspect)
        height_BT = (pixels * proportion).sqrt().round().long()
        width_BT = (pixels / proportion).sqrt().round().long()
        fits_BT = (height_BT < self.height) & (width_BT < self.width)
        first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)
        height_BT, width_BT = height_BT * fits_BT, width_BT * fits_BT
        top_BT = (down * (self.height - height_BT + 1)).long()
        left_BT = (across * (self.width - width_BT + 1)).long()
        edges = (top_BT, left_BT, top_BT + height_BT, left_BT + width_BT)
        return Boxes(*(edge.gather(1, first_B1).squeeze(1) for edge in edges))
