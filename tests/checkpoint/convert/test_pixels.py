"""Test that Hugging Face's processors, read as data settings, give the same pixels in every accepted form."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeiTImageProcessor, ViTImageProcessor

from megavit.checkpoint.convert.hf_processor import read_processor
from megavit.checkpoint.convert.pixels import Pixels, crop_share
from megavit.data.config import DataConfig
from megavit.data.transforms.image import ImageTransform
from megavit.data.transforms.normalize import Normalize
from megavit.errors import ConfigError

CROP = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"height": 32, "width": 32}


def write(folder: Path, settings: dict) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def read(folder: Path, settings: dict, *, channels: int = 3, typed: tuple[str, ...] = ()) -> Pixels:
    return read_processor(write(folder, settings), image_size=[32, 32], channels=channels, typed=typed)[0]


def seen(pixels: Pixels, image_CYX: torch.Tensor) -> torch.Tensor:
    """Return the network's input for one image in a run with these settings."""
    data = DataConfig(image_size=[32, 32], channels=3, crop_pct=pixels.crop_pct, interpolation=pixels.interpolation)
    view = ImageTransform(data, augment=False).crop(image_CYX, 0)
    return Normalize(pixels.mean, pixels.std)(view.unsqueeze(0))[0]


FORMS = {
    "nothing stated but the size": {"size": 32},
    "bilinear": {"size": SQUARE, "resample": 2},
    "bicubic, a list": {"size": [32, 32], "resample": 3},
    "shorter side and centre crop": {**CROP, "resample": 3},
    "sides as numbers": {"size": 40, "default_to_square": False, "do_center_crop": True, "crop_size": 32},
    "squash that a crop leaves whole": {"size": 32, "do_center_crop": True, "crop_size": 32},
    "numbers for mean and std": {"size": 32, "image_mean": 0.4, "image_std": 0.3},
    "lists": {"size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "null is false": {"size": 32, "do_normalize": None, "do_center_crop": None},
    "not normalised": {"size": 32, "do_normalize": False},
    "not rescaled": {"size": 32, "do_rescale": False, "image_mean": [120, 110, 100], "image_std": 60.0},
    "rescaled by another factor": {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "neither rescaled nor normalised": {"size": 32, "do_rescale": False, "do_normalize": False},
    "a fast class": {"size": 32, "image_processor_type": "ViTImageProcessorFast", "resample": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_import_sees_the_processors_pixels(form, tmp_path):
    pixels = read(tmp_path, FORMS[form])
    # Twice the shorter side before the crop, so that nothing is rounded.
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 80, 120), dtype="u1"))
    stated = {key: value for key, value in FORMS[form].items() if key != "image_processor_type"}
    wanted = ViTImageProcessor(**stated)(image, return_tensors="pt")["pixel_values"][0].float()
    # Measured: 1.2e-7 of values up to 1; values up to 255 in the two forms that do not rescale, 1.5e-5.
    assert torch.allclose(seen(pixels, image), wanted, rtol=1e-6, atol=1e-6)


def test_deits_own_defaults_squash_and_then_crop_which_is_refused_unless_typed(tmp_path):
    assert DeiTImageProcessor.size == {"height": 256, "width": 256}
    stated = {"image_processor_type": "DeiTImageProcessor", "image_mean": [0.485, 0.456, 0.406], "crop_size": 32}
    with pytest.raises(ConfigError, match=r"resizes to \[256, 256\] with any aspect ratio, and crops \[32, 32\]"):
        read(tmp_path, stated)
    pixels = read(tmp_path, stated, typed=("data.crop_pct",))
    assert (pixels.mean, pixels.std) == ([0.485, 0.456, 0.406], [0.5] * 3)


REFUSED = {
    r"resample=1 \(lanczos\): megavit resizes bilinear": {"size": 32, "resample": 1},
    r"makes images of \[24, 24\]": {**CROP, "crop_size": 24},
    "resizes the shorter side to 24 and crops 32 pixels": {**CROP, "size": {"shortest_edge": 24}},
    "no centre crop": {"size": {"shortest_edge": 32}},
    "longest_edge": {"size": {"shortest_edge": 40, "longest_edge": 80}, "do_center_crop": True, "crop_size": 32},
    r"makes images of \[64, 64\], and config.json's image_size is \[32, 32\]": {"size": 64},
    "crops without resizing": {"do_resize": False, "do_center_crop": True, "crop_size": 32},
    "image_mean=.* has 2 values and the model takes images of 3": {"size": 32, "image_mean": [0.1, 0.2]},
    "image_std='half' must be a number": {"size": 32, "image_std": "half"},
    "image_mean=None must be a number": {"size": 32, "image_mean": None},
    "rescale_factor=0 must be above 0": {"size": 32, "rescale_factor": 0},
    "do_pad=true": {"size": 32, "do_pad": True},
    "size='big' must be a whole number": {"size": "big"},
    "image_processor_type=BlipImageProcessor is not supported": {
        "size": 32,
        "image_processor_type": "BlipImageProcessor",
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_view_cannot_be_is_refused_in_a_line(message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, REFUSED[message])
    assert "\n" not in str(caught.value)


def test_typed_settings_take_the_place_of_what_is_stated(tmp_path):
    strange = {"image_processor_type": "BlipImageProcessor", "size": 7}
    every = ("data.mean", "data.std", "data.crop_pct", "data.interpolation")
    assert read(tmp_path, strange, typed=every).assumed == ()


def test_a_processor_within_the_models_own_file_is_read_before_the_other(tmp_path):
    write(tmp_path, {"size": 32, "image_mean": 0.1})
    nested = {"image_processor": {"size": 32, "image_mean": 0.2}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_processor(tmp_path, image_size=[32, 32], channels=3, typed=())[0].mean == [0.2] * 3


def test_a_torn_processor_is_refused_and_a_missing_one_assumed(tmp_path):
    pixels, _ = read_processor(tmp_path, image_size=[32, 32], channels=1, typed=())
    assert (pixels.mean, pixels.crop_pct, len(pixels.assumed)) == ([0.5], None, 4)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, ')
    with pytest.raises(ConfigError, match=r"preprocessor_config.json is not valid JSON"):
        read_processor(tmp_path, image_size=[32, 32], channels=3, typed=())


def test_images_that_are_not_resized_must_have_the_size_which_is_said(tmp_path):
    folder = write(tmp_path, {"do_resize": False})
    pixels, notes = read_processor(folder, image_size=[32, 32], channels=3, typed=())
    assert pixels.crop_pct is None
    assert "do_resize=false accepts only images of [32, 32]" in notes[0]


def test_an_imported_crop_resizes_to_the_stated_side():
    for side in (*range(1, 70), 224, 384):
        for shorter in range(side, 2 * side + 3):
            share = crop_share(side, shorter)
            assert 0 < share <= 1
            assert math.floor(side / share) == shorter
    assert [crop_share(224, 256), crop_share(224, 248), crop_share(224, 235), crop_share(224, 224)] == [
        0.875,
        0.9,
        0.95,
        1.0,
    ]
