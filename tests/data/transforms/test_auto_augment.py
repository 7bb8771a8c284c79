"""Random operations on training images: their effects, their random streams, and settings that are refused."""

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.config.compose import compose
from megavit.data.augment_config import AutoAugment
from megavit.data.config import DataConfig
from megavit.data.sampler import SampleKey
from megavit.data.transforms.auto_augment import RandAugment, colour_transforms
from megavit.data.transforms.image import ImageTransform
from megavit.errors import ConfigError

DATA = os.environ.get("MEGAVIT_TEST_DATA")
JITTER = [0.4, 0.4, 0.4, 0.1]
KINDS = {kind.value: {"auto_augment": kind} for kind in AutoAugment} | {"jitter": {"color_jitter": JITTER}}


def colour(size: int = 32, **changes) -> DataConfig:
    config = compose(["data=folder", "recipe=null", "data.path=/data", f"data.image_size=[{size},{size}]"]).data
    return replace(config, **changes)


def pictures(size: int = 32) -> list[torch.Tensor]:
    """Return photographs if there are some, else gradients of a few colours."""
    if DATA is None:
        ramp = torch.linspace(20, 230, size)
        return [
            torch.stack([ramp.expand(size, -1), ramp.flip(0).expand(size, -1).t(), ramp.expand(size, -1).t()]).byte()
        ]
    paths = sorted((Path(DATA) / "imagenet_sample").glob("*/*"))[:4]
    images = [Image.open(path).convert("RGB").resize((size, size)) for path in paths]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in images]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_pictures_by_their_keys_alone(kind):
    config = colour(**KINDS[kind], crop_scale=None, flip=False, crop_pct=None)
    config.check()
    (image, *_), keys = pictures(), [SampleKey(number, 0) for number in range(40)]
    view = ImageTransform(config, augment=True)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    seen = view([image] * 40, keys, seed=0)
    # No other generator is used, and torch's own generator does not change.
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(1)
    np.random.seed(1)
    again = ImageTransform(config, augment=True)([image] * 40, keys[::-1], seed=0)[::-1]
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in seen)
    assert len({one.numpy().tobytes() for one in seen}) > 10
    assert torch.equal(ImageTransform(config, augment=False)([image], keys[:1], seed=0)[0], image)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [2, 4])
def test_views_do_not_depend_on_the_number_of_threads(kind, threads):
    config = colour(256, **KINDS[kind])
    images = pictures(300) * 2
    keys = [SampleKey(number, 0) for number in range(len(images))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ImageTransform(config, augment=True)(images, keys, seed=0)
        torch.set_num_threads(threads)
        together = ImageTransform(config, augment=True)(images, keys, seed=0)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_three_augment_greys_solarises_or_blurs_a_third_each():
    (image, *_) = pictures()
    (three,) = colour_transforms(colour(auto_augment=AutoAugment.three_augment))
    grey = image.float()
    grey = (0.2989 * grey[0] + 0.587 * grey[1] + 0.114 * grey[2]).floor()
    solarised = image.where(image < 128, 255 - image)
    torch.manual_seed(0)
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    for _ in range(900):
        seen = three(image)
        if torch.equal(seen, solarised):
            counts["solarised"] += 1
        elif (seen.float() - grey).abs().max() <= 1:
            counts["grey"] += 1
        else:
            # The mean stays, the standard deviation shrinks.
            assert (seen.float().mean() - image.float().mean()).abs() < 3
            assert seen.float().std() <= image.float().std() + 0.1
            counts["blurred"] += 1
    # 300 expected, standard deviation 14.
    assert all(abs(count - 300) < 60 for count in counts.values()), counts


class Recorder:
    """Replace the operations and record their magnitudes."""

    def __init__(self):
        self.magnitude, self.strengths = 0, []

    def __call__(self, image):
        self.strengths.append(self.magnitude / 100)
        return image


def strengths(count: int = 4000, **changes) -> torch.Tensor:
    rand = RandAugment(colour(auto_augment=AutoAugment.randaugment, **changes))
    rand.one = Recorder()
    torch.manual_seed(0)
    for _ in range(count):
        rand(None)
    return torch.tensor(rand.one.strengths)


def test_magnitudes_have_the_stated_mean_and_standard_deviation_and_stay_within_0_and_10():
    drawn = strengths(randaugment_magnitude=5.0, randaugment_magnitude_std=0.5)
    assert len(drawn) == 8000
    # Standard errors 0.0056 and 0.004.
    assert drawn.mean() == pytest.approx(5, abs=0.025)
    assert drawn.std() == pytest.approx(0.5, abs=0.02)
    wide = strengths(randaugment_magnitude=9.0, randaugment_magnitude_std=5.0)
    assert (wide.min(), wide.max()) == (0, 10)
    assert set(strengths(10, randaugment_magnitude=9.0, randaugment_magnitude_std=0.0).tolist()) == {9.0}
    half = strengths(randaugment_ops=3, randaugment_prob=0.5)
    # 6000 expected, standard deviation 55.
    assert abs(len(half) - 6000) < 250


def test_magnitude_10_turns_by_30_degrees_and_9_by_27():
    turned = []
    for magnitude in (9.0, 10.0):
        (rand,) = colour_transforms(
            colour(auto_augment=AutoAugment.randaugment, randaugment_magnitude=magnitude, randaugment_magnitude_std=0.0)
        )
        rand(pictures()[0])
        fill, signed = rand.one._AUGMENTATION_SPACE["Rotate"]
        assert signed
        turned.append(float(fill(1001, 32, 32)[rand.one.magnitude]))
    assert turned == pytest.approx([27, 30])


def test_pixels_outside_a_rotated_image_take_the_mean_colour():
    (rand,) = colour_transforms(colour(auto_augment=AutoAugment.randaugment))
    white = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    moved = rand.one._apply_image_or_video_transform(white, "TranslateX", 8.0, rand.one.interpolation, rand.one._fill)
    assert moved[:, 0, 0].tolist() == [124, 116, 104]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"randaugment_magnitude": 7.0},
            "randaugment_magnitude=7.0 would be ignored without data.auto_augment=randaug",
        ),
        (
            {"auto_augment": AutoAugment.trivialaugment, "randaugment_ops": 3},
            "data.randaugment_ops=3 would be ignored without data.auto_augment=randaugment; leave it at 2",
        ),
        (
            {"auto_augment": AutoAugment.randaugment, "randaugment_magnitude": 11.0},
            "randaugment_magnitude=11.0 must be",
        ),
        ({"color_jitter": [0.4, 0.4, 0.4]}, r"must be \[brightness, contrast, saturation, hue\]"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.6]}, "the hue at most 0.5"),
        ({"color_jitter": [0.0, 0.0, 0.0, 0.0]}, "set it to null for none"),
        ({"color_jitter": [float("nan"), 0.0, 0.0, 0.0]}, "data.color_jitter"),
        (
            {"channels": 1, "mean": [0.5], "std": [0.5], "color_jitter": JITTER},
            r"data.channels=1 has neither; set data.color_jitter=\[0.4,0.4,0,0\]",
        ),
        (
            {"channels": 1, "mean": [0.5], "std": [0.5], "auto_augment": AutoAugment.three_augment},
            "three_augment removes the colour .* choose randaugment",
        ),
        (
            {"channels": 5, "mean": [0.5] * 5, "std": [0.5] * 5, "auto_augment": AutoAugment.randaugment},
            "data.auto_augment=randaugment is defined for 1 and 3 channels, and data.channels=5; .* data.transform=",
        ),
        (
            {"channels": 2, "mean": [0.5] * 2, "std": [0.5] * 2, "color_jitter": [0.4, 0.0, 0.0, 0.0]},
            r"data.color_jitter=\[0.4, 0.0, 0.0, 0.0\] is defined for 1 and 3 channels",
        ),
    ],
)
def test_settings_that_cannot_work_or_would_be_ignored_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        colour(**changes).check()


@pytest.mark.parametrize("kind", ["autoaugment", "randaugment", "trivialaugment"])
def test_grey_digits_can_be_augmented(kind):
    config = compose(["recipe=digits", f"data.auto_augment={kind}", "data.color_jitter=[0.4,0.4,0,0]"]).data
    config.check()
    seen = ImageTransform(config, augment=True)(
        [torch.arange(64, dtype=torch.uint8).view(1, 8, 8)] * 50, [SampleKey(i, 0) for i in range(50)], seed=0
    )
    assert len({one.numpy().tobytes() for one in seen}) > 10
