"""An encoded image to uint8 values, as a person would see it."""

import io
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from megavit.errors import ConfigError

# A file of a few kilobytes can hold a picture of gigabytes: from here on Pillow warns of it, and we refuse.
_MAX_PIXELS = 89_478_485

_MODES = {1: "L", 3: "RGB"}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")
_NUMPY_MAGIC = b"\x93NUMPY"


def decode_image(encoded: Path | bytes, *, channels: int, name: str) -> Tensor:
    """Decode one image to image_CYX, uint8, upright.

    Pictures are converted to grey (1 channel) or colour (3); for any other number they must have as many themselves.
    The camera's rotation (EXIF) is applied; 16-bit greys are scaled to 8 bits, which Pillow alone would saturate; alpha
    is left away, CMYK and palettes become colours, of an animation the first frame is taken.
    NumPy's .npy files hold [row, column, channel] or [row, column] of uint8 or uint16.

    Args:
        encoded: a file, or a file's content.
        channels: 1 for grey, 3 for colour, or what the images have.
        name: of the image, for the error.

    Raises:
        ConfigError: if it cannot be read, is too large to be decoded safely, or has another number of channels.
    """
    try:
        with encoded.open("rb") if isinstance(encoded, Path) else io.BytesIO(encoded) as file:
            is_array = file.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC
            file.seek(0)
            pixels = _array(file) if is_array else _picture(file, channels)
    except Exception as error:
        # Of any type: of 60,000 images broken at random, Pillow 13 failed on one with a TypeError.
        # Pillow would say of which object in memory.
        told = "it is in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise ConfigError(f"{name} cannot be read as an image: {told}; mend it or take it away") from error
    if pixels.ndim != 3 or pixels.shape[2] != channels:
        has = f"{pixels.shape[2]} channels" if pixels.ndim == 3 else f"the shape {list(pixels.shape)}"
        raise ConfigError(
            f"{name} has {has}, and data.channels={channels}; set data.channels, data.mean and data.std to "
            f"fit, or take it away"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _picture(file: IO[bytes], channels: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(file)
    with opened:
        if opened.width * opened.height > _MAX_PIXELS:
            raise ValueError(
                f"it has {opened.width:,} × {opened.height:,} pixels, and {_MAX_PIXELS:,} are decoded at most; make it "
                f"smaller once"
            )
        image = ImageOps.exif_transpose(opened)
        if image.mode in _SIXTEEN_BIT:
            image = Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.uint32)))
        pixels = np.array(image.convert(_MODES[channels]) if channels in _MODES else image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _array(file: IO[bytes]) -> np.ndarray:
    pixels = np.load(file, allow_pickle=False)
    if pixels.dtype == np.uint16:
        pixels = _to_8_bit(pixels)
    if pixels.dtype != np.uint8 or pixels.size == 0:
        raise ValueError(f"an array of {pixels.dtype} {list(pixels.shape)} is no image; uint8 or uint16 is")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_8_bit(deep: np.ndarray) -> np.ndarray:
    return (deep >> 8).clip(0, 255).astype(np.uint8)
