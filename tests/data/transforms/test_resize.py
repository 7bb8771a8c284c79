"""Evaluation images: timm's and torchvision's frame and centre, also of long images, without resizing all of them."""

import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from megavit.data.config import DataConfig, Interpolation
from megavit.data.decode import decode_image
from megavit.data.sampler import SampleKey
from megavit.data.transforms import resize
from megavit.data.transforms.image import ImageTransform
from megavit.errors import ConfigError

DATA = os.environ.get("MEGAVIT_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEGAVIT_TEST_DATA names no folder of real images")
BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def config(**changes) -> DataConfig:
    return DataConfig(channels=3, mean=[0.5] * 3, std=[0.5] * 3, **changes)


def noise(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, channels), dtype=torch.uint8).permute(2, 0, 1)


def test_resizing_a_part_is_bit_equal_to_that_part_of_the_resized_image(monkeypatch):
    monkeypatch.setattr(resize, "_LONG", 0)
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        image = noise(draw.randint(1, 300), draw.randint(1, 300), draw.choice([1, 3, 3, 4, 5]))
        frame = [draw.randint(1, 200), draw.randint(1, 200)]
        height, width = (draw.randint(1, side) for side in frame)
        box = resize.Box(draw.randint(0, frame[0] - height), draw.randint(0, frame[1] - width), height, width)
        for mode in (BICUBIC, BILINEAR):
            complete = functional.resize(image, frame, mode, antialias=True)
            wanted = complete[:, box.top : box.top + height, box.left : box.left + width]
            assert torch.equal(resize.resize_part(image, frame, box, mode), wanted), (image.shape, frame, box, mode)


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (3, 1001), (700, 9)])
@pytest.mark.parametrize("mode", Interpolation)
def test_a_long_image_is_bit_equal_to_resizing_all_of_it(shape, mode):
    torch.manual_seed(0)
    image, size = noise(*shape), [24, 24]
    frame = resize.eval_frame(shape, size, 0.875)
    assert max(frame) > resize._LONG * 24
    complete = functional.resize(image, frame, InterpolationMode(mode.value), antialias=True)
    seen = ImageTransform(config(image_size=size, crop_pct=0.875, interpolation=mode), augment=False).crop(
        image, draw=0
    )
    assert torch.equal(seen, functional.center_crop(complete, size))


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_line_of_an_image_makes_no_frame_of_millions_of_pixels(shape, monkeypatch):
    original = functional.resize

    def small(image, size, *rest, **more):
        assert size[0] * size[1] < 1e6
        return original(image, size, *rest, **more)

    monkeypatch.setattr(functional, "resize", small)
    for crop_pct in (0.875, None):
        view = ImageTransform(config(image_size=[224, 224], crop_pct=crop_pct), augment=False)
        (seen,) = view([torch.full((3, *shape), 7, dtype=torch.uint8)], [SampleKey(0, 0)], seed=0)
        assert (seen == 7).all()


def test_an_image_that_is_too_large_to_be_resized_is_named(monkeypatch):
    monkeypatch.setattr(resize, "_MAX_PIXELS", 10_000)
    view = ImageTransform(config(image_size=[8, 8]), augment=False)
    with pytest.raises(
        ConfigError, match=r"^tower\.png cannot be resized: resizing its 1 × 2,000 pixels to 8 × 8 needs an"
    ):
        view.preprocess(torch.zeros(3, 2000, 1, dtype=torch.uint8), name="tower.png")


def test_frame_and_centre_are_those_of_timm():
    draw = random.Random(0)
    for _ in range(300):
        shape = draw.randint(1, 700), draw.randint(1, 700)
        side, crop = draw.randint(8, 300), draw.choice([0.5, 0.8, 0.875, 0.9, 0.95, 1.0])
        pictured = transforms_imagenet_eval(side, crop).transforms[0]
        theirs = functional.resize(torch.zeros(1, *shape, dtype=torch.uint8), [pictured.size]).shape[1:]
        assert resize.eval_frame(shape, [side, side], crop) == list(theirs)
        across = [side, side + draw.randint(8, 90)]
        covered = transforms_imagenet_eval(tuple(across), crop).transforms[0]
        if isinstance(covered, ResizeKeepRatio):
            theirs = ResizeKeepRatio.get_params(torch.zeros(1, *shape), covered.size, covered.longest)
            assert resize.eval_frame(shape, across, crop) == theirs
        frame = resize.eval_frame(shape, across, crop)
        counted = torch.arange(frame[0])[:, None] * 100_000 + torch.arange(frame[1])
        corner = int(functional.center_crop(counted[None], across)[0, 0, 0])
        box = resize.center_box(frame, across)
        assert (box.top, box.left) == divmod(corner, 100_000)


@needs_data
@pytest.mark.parametrize("size", [[64, 64], [48, 96]])
@pytest.mark.parametrize("crop_pct", [0.875, None])
def test_photographs_are_seen_as_by_timms_transform_but_for_pillows_rounding(size, crop_pct, figure):
    paths = sorted(path for path in (Path(DATA) / "imagenet_sample").rglob("*") if path.is_file())[:25]
    view = ImageTransform(config(image_size=size, crop_pct=crop_pct), augment=False)
    mode = "center" if crop_pct else "squash"
    theirs = transforms_imagenet_eval(tuple(size), crop_pct or 1.0, mode, interpolation="bicubic", normalize=False)
    off = torch.stack(
        [
            view.crop(decode_image(path, channels=3, name="x"), draw=0).int()
            - theirs(Image.open(path).convert("RGB")).int()
            for path in paths
        ]
    ).abs()
    figure(f"{size}, crop_pct={crop_pct}: {float((off > 0).float().mean()):.2%} differ, at most by {int(off.max())}")
    # Measured: 0.4 %, by 2.
    assert float((off > 0).float().mean()) < 0.01
    assert int(off.max()) <= 2
