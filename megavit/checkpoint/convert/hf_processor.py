"""Read Hugging Face's image processors of ViT and DeiT as settings of the data group.

Source: transformers 5.24, `image_processing_backends.py`: resize, centre crop, rescale, normalise, in this order.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.json_files import height_width, numbers, positive, read_object
from megavit.checkpoint.convert.pixels import Pixels, assumed_pixels, crop_share
from megavit.data.config import PIXEL_SETTINGS, Interpolation
from megavit.errors import ConfigError

_FILE, _OF_PROCESSOR = "preprocessor_config.json", "processor_config.json"

# Defaults for settings that the file does not state, by the first part of the class's name.
_VIT = {
    "resample": 2,
    "image_mean": 0.5,
    "image_std": 0.5,
    "size": {"height": 224, "width": 224},
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "default_to_square": True,
}
_DEIT = {
    "resample": 3,
    "size": {"height": 256, "width": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {"ViT": _VIT, "DeiT": _VIT | _DEIT}
_CLASS_ENDINGS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")

# Pillow's codes.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def read_processor(
    folder: Path, *, image_size: list[int], channels: int, typed: Collection[str]
) -> tuple[Pixels, list[str]]:
    """Read the preprocessing of a model folder's processor.

    Args:
        folder: the model's folder.
        image_size: [height, width] in pixels of the model's input.
        channels: channels of an image.
        typed: data settings given by the user, which are not read from the files.

    Returns:
        The settings, and notes for the user.

    Raises:
        ConfigError: if megavit cannot produce the same pixels.
    """
    found = _read(folder)
    if found is None:
        return assumed_pixels(channels, crop_pct=None, interpolation=Interpolation.bilinear), []
    name, settings = found
    pixels = assumed_pixels(channels, crop_pct=None, interpolation=Interpolation.bilinear)
    pixels.assumed = ()
    if set(PIXEL_SETTINGS) <= set(typed):
        return pixels, []
    processor = _Processor(name, settings)
    if not {"data.mean", "data.std"} <= set(typed):
        pixels.mean, pixels.std = processor.normalisation(channels)
    if "data.interpolation" not in typed:
        pixels.interpolation = processor.interpolation()
    if "data.crop_pct" in typed:
        return pixels, []
    pixels.crop_pct = processor.crop_pct(image_size)
    return pixels, [] if processor.get("do_resize") else [
        f"{name}: do_resize=false accepts only images of {image_size}; megavit resizes other images to it"
    ]


def _read(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the file with a processor's settings, and the settings; transformers searches in this order."""
    nested = folder / _OF_PROCESSOR
    if nested.is_file():
        settings = read_object(nested).get("image_processor")
        if isinstance(settings, dict):
            return nested, settings
    file = folder / _FILE
    return (file, read_object(file)) if file.is_file() else None


class _Processor:
    """One processor's settings, with its class's defaults for missing ones.

    Args:
        file: file of the settings, for errors.
        settings: content of the file.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file = file
        named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViTImageProcessor"
        known = {f"{kind}{ending}": kind for kind in _DEFAULTS for ending in _CLASS_ENDINGS}
        self._unknown = named if named not in known else None
        # An explicit null means false or no value, not the class's default.
        self._stated = settings
        self._settings = _DEFAULTS.get(known.get(named, ""), {}) | settings

    def get(self, key: str) -> Any:
        """Return a setting; None if neither the file nor its class has it.

        Raises:
            ConfigError: if the file does not have it and the class is not known.
        """
        if self._unknown is not None and key not in self._settings:
            raise self._unknown_class(f"states no {key}")
        return self._settings.get(key)

    def normalisation(self, channels: int) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation for values in [0, 1], including the processor's rescaling."""
        mean, std = [0.0] * channels, [1.0] * channels
        if self.get("do_normalize"):
            mean, std = (numbers(self.get(key), channels, self._name(key)) for key in ("image_mean", "image_std"))
        factor = self.get("rescale_factor") if self.get("do_rescale") else 1
        scale = numbers(factor, 1, self._name("rescale_factor"))[0] * 255
        if scale <= 0:
            raise ConfigError(f"{self._name('rescale_factor')}={factor} must be above 0")
        return [value / scale for value in mean], [value / scale for value in std]

    def interpolation(self) -> Interpolation:
        """Return the interpolation of the resizing."""
        resample = self.get("resample") if self.get("do_resize") else _VIT["resample"]
        name = _RESAMPLE.get(resample) if isinstance(resample, int) else None
        if name not in {choice.value for choice in Interpolation}:
            raise ConfigError(
                f"{self._name('resample')}={resample}{f' ({name})' if name else ''}: megavit resizes bilinear (2) or "
                f"bicubic (3); set one: data.interpolation=bicubic, for example"
            )
        return Interpolation(name)

    def crop_pct(self, image_size: list[int]) -> float | None:
        """Return the fraction that the centre crop keeps after a resize of the shorter side; None without a crop."""
        if self._unknown is not None:
            raise self._unknown_class("may have further steps")
        for key in ("do_pad", "do_flip_channel_order"):
            if self.get(key):
                raise ConfigError(f"{self._name(key)}=true: megavit's evaluation has no such step")
        crop = self._sides("crop_size") if self.get("do_center_crop") else None
        if not self.get("do_resize"):
            if crop is not None:
                raise self._refusal("crops without resizing")
            return None
        size = self._size()
        if set(size) == {"shortest_edge"} and crop is not None and crop[0] == crop[1]:
            shorter = positive(size["shortest_edge"], self._name("size"))
            if shorter < crop[0]:
                raise self._refusal(f"resizes the shorter side to {shorter} and crops {crop[0]} pixels")
            self._require_size(crop, image_size)
            return crop_share(crop[0], shorter)
        if set(size) == {"height", "width"}:
            resized = height_width([size["height"], size["width"]], self._name("size"))
            if crop not in (None, resized):
                raise self._refusal(f"resizes to {list(resized)} with any aspect ratio, and crops {list(crop)}")
            if "size" in self._stated or crop is not None:
                self._require_size(resized, image_size)
            # transformers' default of 224 does not fit a model of another size.
            return None
        cut = f"crop_size={list(crop)}" if crop is not None else "no centre crop"
        raise self._refusal(f"has size={size} and {cut}")

    def _size(self) -> dict[str, Any]:
        size = self.get("size")
        if isinstance(size, dict):
            return {key: side for key, side in size.items() if side is not None}
        if isinstance(size, int) and not self.get("default_to_square"):
            return {"shortest_edge": size}
        height, width = height_width(size, self._name("size"))
        return {"height": height, "width": width}

    def _sides(self, key: str) -> tuple[int, int]:
        value = self.get(key)
        if isinstance(value, dict):
            value = [value.get("height"), value.get("width")]
        return height_width(value, self._name(key))

    def _require_size(self, made: tuple[int, int], image_size: list[int]) -> None:
        if list(made) != image_size:
            raise ConfigError(
                f"{self._file} makes images of {list(made)}, and config.json's image_size is {image_size}; make them "
                f"equal"
            )

    def _refusal(self, does: str) -> ConfigError:
        return ConfigError(
            f"{self._file} {does}; megavit resizes the full image, or its shorter side with a square centre crop. "
            f"Set one: data.crop_pct=null, or data.crop_pct=0.875 for example"
        )

    def _unknown_class(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self._file}: image_processor_type={self._unknown} is not supported (ViT's and DeiT's are) and {reason}; "
            f"set its preprocessing: {' '.join(f'{key}=…' for key in PIXEL_SETTINGS)}"
        )

    def _name(self, key: str) -> str:
        return f"{self._file}: {key}"
