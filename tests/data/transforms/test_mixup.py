"""Mixup, cutmix and erasing on the device: the same in every layout, with the stated frequencies and sizes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megavit.config.compose import compose
from megavit.config.saved import to_yaml
from megavit.config.validate import validate
from megavit.data.config import DataConfig
from megavit.data.loader import Batch, Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sampler import SampleKey
from megavit.data.sources.digits import Digits
from megavit.data.transforms.device import DeviceTransforms
from megavit.data.transforms.mixup import MixParams, MixupCutmix, beta_quantiles, neighbours
from megavit.data.transforms.random_erasing import Boxes, Erasing
from megavit.errors import ConfigError
from megavit.inference.trained_run import read_config

CPU = torch.device("cpu")
EVERYTHING = [
    "data.random_erasing=0.5",
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "data.mixup_prob=0.9",
    "data.auto_augment=randaugment",
]


def batch_of(keys: list[SampleKey], images: torch.Tensor | None = None) -> Batch:
    return Batch(images, {}, torch.ones(len(keys), dtype=torch.bool), keys, augmented=True)


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(number, epoch) for number in range(count)]


def see_digits(*, dp=1, micro_batch=16, workers=0) -> dict[SampleKey, tuple[bytes, float]]:
    """Return the final tensors of three steps of 16 across the end of an epoch, and their labels' weights, by key."""
    config = replace(compose(["recipe=digits", *EVERYTHING]).data, workers=workers)
    seen = {}
    for dp_rank in range(dp):
        layout = SimpleNamespace(tp=1, tp_rank=0, pp=1, vpp=1, dp=dp, dp_rank=dp_rank, device=CPU, groups=None)
        fields = RequiredFields(images=True, targets=("labels",))
        loader = Loader(
            Digits("train"),
            config,
            layout=layout,
            fields=fields,
            micro_batch=micro_batch,
            seed=3,
            train=True,
        )
        device = DeviceTransforms(config, seed=3, device=CPU)
        for batch in loader.train_batches(88 * 16, num_steps=3, global_batch=16):
            shares = device.mix(batch).share_B.tolist()
            for key, image, share in zip(batch.keys, device(batch), shares, strict=True):
                seen[key] = (image.numpy().tobytes(), share)
    return seen


@pytest.fixture(scope="module")
def one_process():
    return see_digits()


@pytest.mark.parametrize(
    ("dp", "micro_batch", "workers"), [(1, 2, 0), (1, 4, 2), (2, 8, 0), (2, 2, 2), (4, 4, 0), (4, 2, 0)]
)
def test_final_tensors_are_the_same_bits_in_any_division(dp, micro_batch, workers, one_process):
    assert len(one_process) == 48
    assert {key.epoch for key in one_process} == {0, 1}
    assert see_digits(dp=dp, micro_batch=micro_batch, workers=workers) == one_process


def test_evaluated_images_are_only_normalised():
    config = compose(["recipe=digits", *EVERYTHING]).data
    device, images = (
        DeviceTransforms(config, seed=0, device=CPU),
        torch.stack([Digits("val").image(i) for i in range(4)]),
    )
    batch = batch_of(keys(4), images)
    plain = device.normalize(images)
    assert not torch.equal(device(batch), plain)
    evaluated = replace(batch, augmented=False)
    assert torch.equal(device(evaluated), plain)
    assert device.mix(evaluated) is None


def test_neighbours_are_the_other_ones_of_their_pairs():
    assert neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_images_and_labels_are_mixed_as_computed_by_hand():
    # The first of each pair gets a quarter of its neighbour, the second a box of 2 of 4 pixels; the others stay.
    none = torch.zeros(4, dtype=torch.long)
    boxes = Boxes(none, none, torch.tensor([0, 1, 0, 0]), torch.tensor([0, 2, 0, 0]))
    mix = MixParams(
        torch.tensor([0.75, 0.5, 1.0, 1.0], dtype=torch.float64), boxes, torch.tensor([False, True, False, False])
    )
    images = torch.tensor([4.0, 8.0, 1.0, 2.0]).view(4, 1, 1, 1).expand(-1, 1, 2, 2)
    assert mix.images(images).squeeze(1).tolist() == [
        [[5, 5], [5, 5]],
        [[4, 4], [8, 8]],
        [[1, 1], [1, 1]],
        [[2, 2], [2, 2]],
    ]
    one_hot = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert mix.targets(one_hot).tolist() == [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 1], [1, 0, 0]]


def draw(count: int = 20_000, size: int = 32, **changes) -> MixParams:
    config = DataConfig(image_size=[size, size], **changes)
    config.check()
    return MixupCutmix(config, seed=0).draw(batch_of(keys(count)))


def test_images_are_mixed_as_often_as_stated():
    # Standard deviation of a fraction p of 20,000: sqrt(p (1 − p) / 20,000), 0.0035 at ½; five of them are allowed.
    mix = draw(mixup=0.8, cutmix=1.0, mixup_prob=0.6, mixup_switch_prob=0.25)
    # A box may have no pixels: about one in a thousand of 32 × 32.
    mixed = (mix.share_B < 1) | mix.cut_B
    assert mixed.double().mean() == pytest.approx(0.6, abs=0.0175)
    assert mix.cut_B.double().mean() == pytest.approx(0.15, abs=0.013)
    assert draw(cutmix=1.0).cut_B.all()
    assert not draw(mixup=0.2).cut_B.any()
    assert draw(mixup=0.2, cutmix=1.0, mixup_switch_prob=0.0).cut_B.sum() == 0


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 3.0, 10.0])
def test_weights_are_sampled_from_beta(alpha, figure):
    stats = pytest.importorskip("scipy.stats")
    low, high = beta_quantiles(alpha).chunk(2)
    # Near 1 a float64 is too coarse for its probability; use the mirrored values near 0 there.
    assert torch.equal(high, 1 - low.flip(0))
    probabilities = (np.arange(2**15) + 0.5) / 2**16
    # Measured: 5.7e-11 at worst, at alpha 0.1 and 10.
    worst = abs(stats.beta.cdf(low.numpy(), alpha, alpha) - probabilities).max()
    figure(f"Beta({alpha}, {alpha}): the distribution function of our quantiles is off by {worst:.1e} at most")
    assert worst < 1e-9
    share = draw(mixup=alpha).share_B
    variance = 1 / (4 * (2 * alpha + 1))
    # Five standard errors of the mean; the variance's error is below sqrt(2 / 20,000) of it for a light-tailed law.
    assert share.mean() == pytest.approx(0.5, abs=5 * math.sqrt(variance / 20_000))
    assert share.var() == pytest.approx(variance, rel=0.05)


def test_cutmix_cuts_the_area_that_it_takes_from_the_label():
    mix = draw(cutmix=1.0, size=64)
    top, left, bottom, right = mix.boxes
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= 64).all()
    assert (right <= 64).all()
    area = (bottom - top) * (right - left)
    assert torch.equal(mix.share_B, 1 - area / 64**2)
    few = draw(200, cutmix=1.0, size=64)
    images = torch.zeros(200, 1, 64, 64)
    images[1::2] = 1
    ones = few.images(images).mean(dim=(1, 2, 3))
    assert torch.allclose(torch.where(torch.arange(200) % 2 == 1, ones, 1 - ones).double(), few.share_B, atol=1e-6)
    # Clipped at the edge a box of side r keeps 1 − r/4 of each side in the mean (its centre is uniform, its half is
    # r/2): the area lost to the neighbour has the mean of E[r² (1 − r/4)²], r² uniform for alpha 1: 0.3208.
    assert area.double().mean() / 64**2 == pytest.approx(0.3208, abs=0.012)


def test_another_epoch_seed_or_occurrence_mixes_otherwise():
    config = DataConfig(mixup=1.0)
    base = MixupCutmix(config, seed=0).draw(batch_of(keys(4))).share_B
    for seed, some in ((1, keys(4)), (0, keys(4, epoch=1)), (0, [SampleKey(i, 0, 1) for i in range(4)])):
        assert not (MixupCutmix(config, seed=seed).draw(batch_of(some)).share_B == base).any()


def test_another_epoch_seed_or_occurrence_erases_with_other_noise():
    def noise(seed: int, some: list[SampleKey]) -> torch.Tensor:
        erasing = Erasing(DataConfig(random_erasing=1.0, image_size=[64, 64]), seed=seed)
        return erasing(torch.zeros(4, 1, 64, 64), batch_of(some))

    base = noise(0, keys(4))
    for seed, some in ((1, keys(4)), (0, keys(4, epoch=1)), (0, [SampleKey(i, 0, 1) for i in range(4)])):
        other = noise(seed, some)
        both = (base != 0) & (other != 0)
        assert both.any()
        # By chance 0.14% are equal: the noise has 2,041 values, with a standard deviation of 209.
        assert (base[both] == other[both]).double().mean() < 0.01


def test_boxes_are_erased_as_often_and_as_large_as_stated():
    erasing, batch = Erasing(DataConfig(random_erasing=0.25, image_size=[224, 224]), seed=0), batch_of(keys(20_000))
    # Standard deviation 61.
    assert abs(len(erasing.erased(batch)) - 5000) < 306
    top, left, bottom, right = (edge.double() for edge in erasing.boxes(batch))
    height, width = bottom - top, right - left
    share = height * width / 224**2
    # Rounding moves the area by up to a pixel of each side.
    assert 0.018 < share.min() < 0.022
    assert 0.32 < share.max() < 0.337
    # Uniform: mean 0.1767, standard deviation 0.0905, for 20,000 ± 0.0006; boxes that do not fit are sampled again,
    # which removes large ones slightly more often.
    assert share.mean() == pytest.approx(0.1767, abs=0.004)
    proportion = (height / width).log()
    assert proportion.mean().abs() < 0.03
    assert proportion.min() > math.log(0.28)
    assert proportion.max() < math.log(1 / 0.28)
    assert min(float(edge.min()) for edge in (top, left)) == 0
    assert (bottom.max(), right.max()) == (224, 224)


def test_an_erased_box_is_normal_noise_and_everything_else_stays():
    erasing, batch = (
        Erasing(DataConfig(random_erasing=0.5, image_size=[64, 48], channels=3), seed=0),
        batch_of(keys(200)),
    )
    images = torch.full((200, 3, 64, 48), 7.0)
    erased = erasing(images, batch)
    rows = erasing.erased(batch)
    inside = erasing.boxes(batch).inside(64, 48, device=CPU)
    inside[[row for row in range(200) if row not in set(rows.tolist())]] = False
    assert 60 < len(rows) < 140
    assert torch.equal(erased == 7.0, ~inside.expand(-1, 3, -1, -1))
    noise = erased[inside.expand(-1, 3, -1, -1)]
    # About 150,000 values: standard errors 0.0026 and 0.0018.
    assert abs(noise.mean()) < 0.015
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert noise.abs().max() < 4.9
    one = erased[rows[0]][inside[rows[0]].expand(3, -1, -1)]
    other = erased[rows[1]][inside[rows[1]].expand(3, -1, -1)]
    assert not torch.equal(one[:20], other[:20])


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (
            ["data.mixup=0.8", "train.micro_batch=3", "train.global_batch=6"],
            1,
            r"data.mixup=0.8 mixes .* in pairs, and train.micro_batch=3 leaves one over: 3 mod 2 = 1; set "
            r"train.micro_batch=2,",
        ),
        (["data.cutmix=1.0", "train.global_batch=6"], 2, "data.cutmix=1.0 mixes .* train.micro_batch=3 leaves"),
        (["data.mixup=0"], 1, "data.mixup=0.0 must be a finite number above 0"),
        (["data.random_erasing=1.5"], 1, "data.random_erasing=1.5 must be"),
        (["data.mixup_prob=0.5"], 1, "data.mixup_prob=0.5 would be ignored without data.mixup or data.cutmix"),
        (
            ["data.mixup=0.8", "data.mixup_switch_prob=1"],
            1,
            "data.mixup_switch_prob=1.0 would be ignored without data.mixup and",
        ),
        (["recipe=digits_mae", "data.mixup=0.8"], 1, "data.mixup=0.8 would be ignored by task.name=mae, .* to null"),
        (
            ["recipe=digits_mae", "data.random_erasing=0.25"],
            1,
            "data.random_erasing=0.25 would be ignored by task.name=mae, .* to 0.0",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_the_way_out(overrides, world, message):
    with pytest.raises(ConfigError, match=message):
        validate(compose(overrides), world)


def test_a_run_that_mixed_is_evaluated_in_micro_batches_of_any_size(tmp_path):
    config = compose(["data.mixup=0.8", "data.cutmix=1.0", "data.mixup_switch_prob=0.3"])
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    evaluated = read_config(tmp_path)
    validate(replace(evaluated, train=replace(evaluated.train, micro_batch=3, global_batch=3)), 1)
    assert not evaluated.data.mixes
