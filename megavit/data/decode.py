"""Decode images to uint8, upright and in the requested number of channels."""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from megavit.errors import ConfigError

# A file of a few kilobytes can hold an image of gigabytes: Pillow warns above this size, megavit refuses.
_MAX_PIXELS = 89_478_485

_MODES = {1: "L", 3: "RGB"}
# Unsigned 16-bit greyscale. Pillow reads such PNGs (before version 11) and PGMs in its signed 32-bit mode.
_SIXTEEN_BIT, _SIXTEEN_IN_32 = ("I;16", "I;16B", "I;16L", "I;16N"), ("PNG", "PPM")
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_NUMPY_MAGIC, _JPEG_MAGIC = b"\x93NUMPY", b"\xff\xd8\xff"

# (mode, channels) for which decode_jpeg equals Pillow; CMYK, and colour to grey, are decoded by Pillow.
_READ_MODES = {("RGB", 3): ImageReadMode.RGB, ("L", 3): ImageReadMode.RGB, ("L", 1): ImageReadMode.GRAY}
# EXIF orientation: whether rows and columns are swapped, and which of them are then mirrored.
_TURNS = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
# libjpeg's reductions, the largest first; and the smallest number of decoded pixels per resized pixel and side.
_REDUCTIONS, _REDUCED_PER_PIXEL = (8, 4, 2), 2


@dataclass(frozen=True)
class Box:
    """A box in an upright image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Jpeg:
    """A JPEG whose header has been read: its size is known before it is decoded.

    Attributes:
        height: height of the upright image, in pixels.
        width: width of the upright image, in pixels.
    """

    def __init__(self, content: bytes, header: Image.Image, *, channels: int, name: str) -> None:
        self._content, self._channels, self._name = content, channels, name
        self._read_mode = _READ_MODES[header.mode, channels]
        self._swapped, self._mirrored = _TURNS.get(header.getexif().get(ExifTags.Base.Orientation, 1), (False, ()))
        self.height, self.width = (header.width, header.height) if self._swapped else (header.height, header.width)

    def decode(self) -> Tensor:
        """Decode the full image_CYX, uint8, upright.

        Raises:
            ConfigError: if it cannot be read.
        """
        with _refused_by(self._name):
            try:
                pixels = decode_jpeg(torch.frombuffer(bytearray(self._content), dtype=torch.uint8), self._read_mode)
            except RuntimeError:
                # Of 160,000 randomly corrupted JPEGs torchvision refused 120 that Pillow 13 accepts, and accepted one
                # that Pillow refuses because it cannot write the EXIF back. So Pillow decides, and words the error.
                with _opened(io.BytesIO(self._content)) as opened:
                    return _planes(_pixels(opened, self._channels))
            return _planes(self._upright(pixels.permute(1, 2, 0)))

    def resized(self, box: Box, size: list[int], *, resample: Image.Resampling) -> Tensor | None:
        """Decode a box at a half, a quarter or an eighth of the scale, and resize it.

        Args:
            box: the part of the image.
            size: [height, width] of the result.
            resample: interpolation.

        Returns:
            image_CYX, uint8; None if the box is too small: two decoded pixels per resized pixel and side are required,
            as in Pillow's `thumbnail`.

        Raises:
            ConfigError: if it cannot be read.
        """
        enlarged = min(box.height / size[0], box.width / size[1])
        reduction = next((by for by in _REDUCTIONS if enlarged >= by * _REDUCED_PER_PIXEL), None)
        if reduction is None:
            return None
        with _refused_by(self._name), _opened(io.BytesIO(self._content)) as opened:
            stored = (opened.width, opened.height)
            opened.draft(None, (stored[0] // reduction, stored[1] // reduction))
            # The last decoded pixels may cover fewer original pixels: the sides are rounded up.
            by = 2 ** round(math.log2(stored[0] / opened.width))
            left, top, right, bottom = (side / by for side in self._sides_as_stored(box))
            # Crop before resizing: pixels outside the box must not affect its border.
            first, above = math.floor(left), math.floor(top)
            part = opened.crop((first, above, math.ceil(right), math.ceil(bottom))).convert(_MODES[self._channels])
            inside = (left - first, top - above, right - first, bottom - above)
            target = size if self._swapped else size[::-1]
            pixels = np.array(part.resize((target[0], target[1]), resample, inside))
            return _planes(self._upright(torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels)))

    def _upright(self, pixels_YXC: Tensor) -> Tensor:
        turned = pixels_YXC.transpose(0, 1) if self._swapped else pixels_YXC
        return turned.flip(self._mirrored).contiguous() if self._mirrored or self._swapped else turned

    def _sides_as_stored(self, box: Box) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the same part before the image is turned upright."""
        top, left = box.top, box.left
        if 0 in self._mirrored:
            top = self.height - top - box.height
        if 1 in self._mirrored:
            left = self.width - left - box.width
        if self._swapped:
            return top, left, top + box.height, left + box.width
        return left, top, left + box.width, top + box.height


def decode_image(encoded: Path | bytes, *, channels: int, name: str) -> Tensor:
    """Decode one image to image_CYX, uint8, upright.

    Images are converted to grey (1 channel) or colour (3); with any other number they must have as many channels. The
    EXIF orientation is applied. 16-bit grey is scaled to 8 bits, which Pillow would saturate. Floats, signed and
    32-bit integers are refused, because their black and white are not defined. Alpha is dropped, CMYK and palettes are
    converted to RGB, and the first frame of an animation is used. NumPy's .npy files contain [row, column, channel] or
    [row, column] of uint8 or uint16. The memory format is channels last, which torchvision resizes in half the time.

    Args:
        encoded: a file, or a file's content.
        channels: 1 for grey, 3 for colour, or the number of channels of the images.
        name: name of the image, for the error.

    Returns:
        image_CYX, uint8, in its original size.

    Raises:
        ConfigError: if the image cannot be read, is too large to be decoded safely, or has pixels of another type or
            another number of channels.
    """
    image = open_image(encoded, channels=channels, name=name)
    return image.decode() if isinstance(image, Jpeg) else image


def open_image(encoded: Path | bytes, *, channels: int, name: str) -> Tensor | Jpeg:
    """Decode one image as `decode_image` does, but read only the header of a JPEG, which may be decoded in part later.

    Args:
        encoded: a file, or a file's content.
        channels: 1 for grey, 3 for colour, or the number of channels of the images.
        name: name of the image, for the error.

    Returns:
        image_CYX, uint8; a `Jpeg` for a JPEG that need not be converted.

    Raises:
        ConfigError: for the reasons of `decode_image`.
    """
    with _refused_by(name), encoded.open("rb") if isinstance(encoded, Path) else io.BytesIO(encoded) as file:
        magic = file.read(len(_NUMPY_MAGIC))
        file.seek(0)
        if magic == _NUMPY_MAGIC:
            pixels = _array(file)
        elif magic.startswith(_JPEG_MAGIC):
            content = file.read()
            with _opened(io.BytesIO(content)) as opened:
                if opened.format in ("JPEG", "MPO") and (opened.mode, channels) in _READ_MODES:
                    return Jpeg(content, opened, channels=channels, name=name)
                pixels = _pixels(opened, channels)
        else:
            with _opened(file) as opened:
                pixels = _pixels(opened, channels)
    if pixels.ndim != 3 or pixels.shape[2] != channels:
        has = f"{pixels.shape[2]} channels" if pixels.ndim == 3 else f"the shape {list(pixels.shape)}"
        raise ConfigError(
            f"{name} has {has}, and data.channels={channels}; set data.channels, data.mean and data.std to "
            f"fit, or remove it"
        )
    return _planes(pixels)


@contextmanager
def _refused_by(name: str) -> Iterator[None]:
    """Raise errors from the block as ConfigError that names the image."""
    try:
        yield
    except Exception as error:
        # Any exception: for one of 60,000 randomly corrupted images Pillow 13 raised a TypeError.
        # Pillow's message names an object in memory.
        message = "Pillow does not know its format" if isinstance(error, UnidentifiedImageError) else error
        raise ConfigError(f"{name} cannot be read as an image: {message}; repair or remove it") from error


def _opened(file: IO[bytes]) -> Image.Image:
    """Open an image and read its header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(file)
    if opened.width * opened.height > _MAX_PIXELS:
        raise ValueError(
            f"it has {opened.width:,} × {opened.height:,} pixels, and {_MAX_PIXELS:,} are decoded at most; resize it "
            f"beforehand"
        )
    return opened


def _pixels(opened: Image.Image, channels: int) -> np.ndarray:
    _refuse_unscaled(opened)
    # Pillow inverts such images only if they have 8 bits.
    inverts = opened.mode in _SIXTEEN_BIT and _tiff_tag(opened, PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
    image = ImageOps.exif_transpose(opened)
    if image.mode in (*_SIXTEEN_BIT, "I"):
        grey = _to_8_bit(np.asarray(image, dtype=np.uint32))
        image = Image.fromarray(255 - grey if inverts else grey)
    pixels = np.array(image.convert(_MODES[channels]) if channels in _MODES else image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _refuse_unscaled(opened: Image.Image) -> None:
    """Raise ValueError for pixels that Pillow would clamp or wrap: floats, signed and 32-bit integers."""
    is_wide = opened.mode == "F" or (opened.mode == "I" and opened.format not in _SIXTEEN_IN_32)
    if is_wide or _tiff_tag(opened, SAMPLEFORMAT) not in (None, _UNSIGNED):
        raise ValueError(
            f"its pixels are floats or signed or 32-bit integers (Pillow's mode {opened.mode}), whose black and white "
            f"are not defined; save it as uint8 or uint16"
        )


def _tiff_tag(opened: Image.Image, tag: int) -> int | None:
    """Return the value of a TIFF tag, for the first channel; None if there is none."""
    if not isinstance(opened, TiffImageFile):
        return None
    value = opened.tag_v2.get(tag)
    return value[0] if isinstance(value, tuple) else value


def _array(file: IO[bytes]) -> np.ndarray:
    pixels = np.load(file, allow_pickle=False)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        pixels = _to_8_bit(pixels)
    if pixels.dtype != np.uint8 or pixels.size == 0:
        raise ValueError(f"an array of {pixels.dtype} {list(pixels.shape)} is no image; save it as uint8 or uint16")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_8_bit(deep: np.ndarray) -> np.ndarray:
    return (deep >> 8).astype(np.uint8)


def _planes(pixels_YXC: np.ndarray | Tensor) -> Tensor:
    pixels = torch.from_numpy(pixels_YXC) if isinstance(pixels_YXC, np.ndarray) else pixels_YXC
    return pixels.permute(2, 0, 1)
