"""Resize an image, or only the part of it that a centre crop keeps.

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

# If the resized image has more than this many times the crop's height or width, only the crop is computed.
_LONG = 16
# torch resizes the columns first; the intermediate image may have this many pixels.
_MAX_PIXELS = 2**27
# torch's weights for uint8 images are 16-bit integers, of which one bit is the sign.
_WEIGHT_BITS, _MOST_BITS = 15, 22
# Number of pixels of the resized side that are searched for the largest weight.
_SEARCHED = 4096


@contextmanager
def named_if_too_large(name: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation in the context into an error that names the image.

    Raises:
        ConfigError: if the image needs more memory than is available or allowed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{name()} cannot be resized: {reason}; resize or remove it") from error


def eval_frame(size: tuple[int, int], crop_size: list[int], crop_pct: float) -> list[int]:
    """Return the height and width to which an image is resized before its centre is cropped, in timm's rounding.

    Args:
        size: height and width of the image, in pixels.
        crop_size: height and width of the crop, in pixels.
        crop_pct: fraction of the frame's sides that the crop has.

    Source: timm 1.0.31, `transforms_imagenet_eval`. For a square it uses torchvision's `Resize` of the shorter side,
    whose rounding Hugging Face's processors share; otherwise timm's `ResizeKeepRatio`.
    """
    covered = [math.floor(side / crop_pct) for side in crop_size]
    if covered[0] == covered[1]:
        return [int(covered[0] * side / min(size)) for side in size]
    ratio = min(side / cover for side, cover in zip(size, covered, strict=True))
    return [round(side / ratio) for side in size]


def center_box(frame: list[int], crop_size: list[int]) -> Box:
    """Return the box of a centre crop, in torchvision's and timm's rounding."""
    top, left = (round((side - cut) / 2) for side, cut in zip(frame, crop_size, strict=True))
    return Box(top, left, *crop_size)


def resize(image_CYX: Tensor, size: list[int], interpolation: InterpolationMode) -> Tensor:
    """Resize a uint8 image with antialiasing.

    Args:
        image_CYX: uint8 image.
        size: [height, width] of the result, in pixels.
        interpolation: bilinear or bicubic.

    Raises:
        MemoryError: if the intermediate image would have more than 2²⁷ pixels.
    """
    rows, columns = image_CYX.shape[1], size[1]
    if rows * columns > _MAX_PIXELS:
        raise MemoryError(
            f"resizing its {image_CYX.shape[2]:,} × {rows:,} pixels to {size[1]} × {size[0]} needs an intermediate "
            f"image of {columns:,} × {rows:,} pixels, and {_MAX_PIXELS:,} are allowed"
        )
    return functional.resize(image_CYX, size, interpolation, antialias=True)


def resize_nearest(target_YX: Tensor, frame: list[int], box: Box) -> Tensor:
    """Resize target_YX to a frame and crop a box from it; each value is that of the nearest pixel."""
    rows = _nearest(target_YX.shape[0], frame[0], box.top, box.height)
    columns = _nearest(target_YX.shape[1], frame[1], box.left, box.width)
    return target_YX[rows][:, columns]


def _nearest(source: int, target: int, first: int, count: int) -> Tensor:
    """Return the pixels of a side of `source` that are nearest to `count` pixels of `target`, from `first` on."""
    centres = torch.arange(first, first + count, dtype=torch.float64) + 0.5
    return (centres * source / target).long().clamp(0, source - 1)


def resize_part(image_CYX: Tensor, frame: list[int], box: Box, interpolation: InterpolationMode) -> Tensor:
    """Resize a uint8 image to a frame and crop a box from it; if the frame is much larger, compute only the box.

    Both ways give the same bits. torch's own resizing is faster if the crop removes little.
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
    """Return the weights with which torch resizes a side from `source` to `target` pixels, for a range of the target.

    Args:
        source: pixels of the side before resizing.
        target: pixels of the side after resizing.
        first: first pixel of the range in the target.
        count: number of pixels in the range.
        interpolation: bilinear or bicubic.

    Returns:
        The source pixels that have a weight; their integer weights, as float64 [count, pixels]; the number of bits by
        which a sum of weighted pixels is shifted.

    Source: torch 2.14, aten/src/ATen/native/cpu/UpSampleKernel.cpp, `_compute_index_ranges_int16_weights`.
    """
    if source == target:
        return slice(first, first + count), 2 * torch.eye(count, dtype=torch.float64), 1
    at, exact = _exact_weights(source, target, torch.arange(first, first + count), interpolation)
    # The largest weight of the full side determines the number of bits.
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
    """Return each target's source pixels that have a weight, and these weights, float64 [targets, pixels]."""
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
    # Keys' cubic kernel with a = −0.5, as in Pillow.
    near = (1.5 * distances - 2.5) * distances * distances + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))
