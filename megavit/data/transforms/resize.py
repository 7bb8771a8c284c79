"""Resize an image, or the part of it that a centre crop keeps, without holding what is cut off.

Shapes: C channels, Y rows, X columns.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from megavit.data.decode import Box
from megavit.errors import ConfigError

# An image that is resized to more than this many times the crop's height or width is cut before it is resized.
_LONG = 16
# torch resizes the columns first; so many pixels may lie between that and the rows.
_MAX_PIXELS = 2**27
# torch's weights for uint8 images are 16-bit integers, one of the bits a sign.
_WEIGHT_BITS, _MOST_BITS = 15, 22
# So many pixels of the resized side are looked at for the largest weight.
_SEARCHED = 4096


@contextmanager
def named_if_too_large(name: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that fails within into an error that names the image.

    Raises:
        ConfigError: if the image within needs more memory than there is, or than an image may need.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{name()} cannot be resized: {reason}; resize it or take it away") from error


def eval_frame(size: tuple[int, int], crop_size: list[int], crop_pct: float) -> list[int]:
    """Height and width that an image is resized to before its centre is cut out, in timm's rounding.

    Args:
        size: height and width of the image.
        crop_size: height and width that are cut out.
        crop_pct: their share of the frame.

    Source: timm 1.0.31, `transforms_imagenet_eval`: for a square torchvision's `Resize` of the shorter side, which
    Hugging Face's processors round as well; else timm's own `ResizeKeepRatio`.
    """
    covered = [math.floor(side / crop_pct) for side in crop_size]
    if covered[0] == covered[1]:
        return [int(covered[0] * side / min(size)) for side in size]
    ratio = min(side / cover for side, cover in zip(size, covered, strict=True))
    return [round(side / ratio) for side in size]


def center_box(frame: list[int], crop_size: list[int]) -> Box:
    """The centre of a frame, in torchvision's and timm's rounding."""
    top, left = (round((side - cut) / 2) for side, cut in zip(frame, crop_size, strict=True))
    return Box(top, left, *crop_size)


def resize(image_CYX: Tensor, size: list[int], interpolation: InterpolationMode) -> Tensor:
    """Resize a uint8 image, with antialiasing.

    Raises:
        MemoryError: if more than 2²⁷ pixels would be made on the way.
    """
    rows, columns = image_CYX.shape[1], size[1]
    if rows * columns > _MAX_PIXELS:
        raise MemoryError(
            f"of its {image_CYX.shape[2]:,} × {rows:,} pixels {columns:,} × {rows:,} would be made on the way to "
            f"{size[1]} × {size[0]}, and {_MAX_PIXELS:,} are made at most"
        )
    return functional.resize(image_CYX, size, interpolation, antialias=True)


def resize_nearest(target_YX: Tensor, frame: list[int], box: Box) -> Tensor:
    """Resize a map of numbers to a frame and cut a box out of it; each number is that of the nearest pixel."""
    rows = _nearest(target_YX.shape[0], frame[0], box.top, box.height)
    columns = _nearest(target_YX.shape[1], frame[1], box.left, box.width)
    return target_YX[rows][:, columns]


def _nearest(source: int, target: int, first: int, count: int) -> Tensor:
    """Return the pixels of a side of `source` that are nearest to `count` pixels of `target`, from `first` on."""
    centres = torch.arange(first, first + count, dtype=torch.float64) + 0.5
    return (centres * source / target).long().clamp(0, source - 1)


def resize_part(image_CYX: Tensor, frame: list[int], box: Box, interpolation: InterpolationMode) -> Tensor:
    """Resize a uint8 image to a frame and cut a box out of it; of a long image only the pixels that the box sees.

    Both ways give the same bits. torch's own resizing is the faster one where little is cut off.
    """
    if max(frame[0] / box.height, frame[1] / box.width) <= _LONG:
        resized = resize(image_CYX, frame, interpolation)
        return resized[:, box.top : box.top + box.height, box.left : box.left + box.width]
    columns, weights_across, bits_across = _weights(image_CYX.shape[2], frame[1], box.left, box.width, interpolation)
    rows, weights_down, bits_down = _weights(image_CYX.shape[1], frame[0], box.top, box.height, interpolation)
    across = _rounded(image_CYX[:, rows, columns].double() @ weights_across.T, bits_across)
    return _rounded(weights_down @ across, bits_down).to(torch.uint8)


def _rounded(sums: Tensor, bits: int) -> Tensor:
    return ((sums + 2 ** (bits - 1)) / 2**bits).floor().clamp(0, 255)


def _weights(
    source: int, target: int, first: int, count: int, interpolation: InterpolationMode
) -> tuple[slice, Tensor, int]:
    """The weights by which torch resizes a side from `source` to `target` pixels, of `count` pixels from `first` on.

    Returns:
        The pixels of the source that have a weight; their integer weights, as float64 [count, pixels]; the number of
        bits by which a sum of weighted pixels is shifted.

    Source: torch 2.14, aten/src/ATen/native/cpu/UpSampleKernel.cpp, `_compute_index_ranges_int16_weights`.
    """
    if source == target:
        return slice(first, first + count), 2 * torch.eye(count, dtype=torch.float64), 1
    at, exact = _exact_weights(source, target, torch.arange(first, first + count), interpolation)
    # The bits are those that the largest weight of the whole side leaves.
    _, others = _exact_weights(source, target, torch.arange(min(target, _SEARCHED)), interpolation)
    largest, bits = max(float(exact.max()), float(others.max())), 0
    while bits < _MOST_BITS and int(0.5 + largest * 2 ** (bits + 1)) < 2**_WEIGHT_BITS:
        bits += 1
    pixels = slice(int(at.min()), int(at.max()) + 1)
    weights = torch.zeros(count, pixels.stop - pixels.start, dtype=torch.float64)
    weights.scatter_add_(1, at - pixels.start, (exact * 2**bits + 0.5 * exact.sign()).trunc())
    return pixels, weights, bits


def _exact_weights(
    source: int, target: int, targets: Tensor, interpolation: InterpolationMode
) -> tuple[Tensor, Tensor]:
    """For each of the targets the source's pixels that have a weight, and these weights, float64 [targets, pixels]."""
    bicubic = interpolation is InterpolationMode.BICUBIC
    scale = source / target
    stretch = max(scale, 1.0)
    centres = scale * (targets.double() + 0.5)
    reach = (2 if bicubic else 1) * stretch
    low, high = (centres - reach + 0.5).long().clamp(min=0), (centres + reach + 0.5).long().clamp(max=source)
    at = low[:, None] + torch.arange(int((high - low).max()))
    weights = (_cubic if bicubic else _triangle)(((at - centres[:, None] + 0.5) * (1 / stretch)).abs())
    weights = weights * (at < high[:, None])
    return at.clamp(max=source - 1), weights / weights.sum(dim=1, keepdim=True)


def _triangle(distances: Tensor) -> Tensor:
    return (1 - distances).clamp(min=0)


def _cubic(distances: Tensor) -> Tensor:
    # Keys' cubic with a = −0.5, as Pillow's.
    near = (1.5 * distances - 2.5) * distances * distances + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))
