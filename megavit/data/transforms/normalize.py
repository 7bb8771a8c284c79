"""Shift uint8 images by whole pixels, and normalise them on the training device.

Shapes: B images, C channels, Y rows, X columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.data.sampler import SampleKey
from megavit.parallel.rng import RandomStream, uniform


def draw_shifts(keys: list[SampleKey], *, pixels: int, seed: int) -> list[list[int]]:
    """Sample each image's shift, [down, across] in pixels, as a function of its key and the seed."""
    columns = torch.tensor([(key.epoch, key.sample_id, key.occurrence) for key in keys]).unbind(dim=1)
    streams = (RandomStream.SHIFT_DOWN, RandomStream.SHIFT_ACROSS)
    draws_B2 = torch.stack([uniform(seed, *columns, stream) for stream in streams], dim=1)
    return ((draws_B2 * (2 * pixels + 1)).long() - pixels).tolist()


def shift_image(image_CYX: Tensor, down: int, across: int) -> Tensor:
    """Shift an image and pad it with 0."""
    return F.pad(image_CYX, (across, -across, down, -down))


class Normalize(torch.nn.Module):
    """Map uint8 images to floats of zero mean and unit standard deviation, on the training device.

    Args:
        mean: mean of each channel, of values in [0, 1].
        std: standard deviation of each channel, of values in [0, 1].
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean_C11", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return (images_BCYX.float() / 255 - self.mean_C11) / self.std_C11

    def undo(self, normalized_BCYX: Tensor) -> Tensor:
        """Return images in the range of pixels, of which [0, 1] can be shown."""
        return normalized_BCYX * self.std_C11 + self.mean_C11
