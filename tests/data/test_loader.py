"""The loader: a rank's samples do not depend on workers, micro batch or number of ranks."""

from types import SimpleNamespace

import pytest
import torch

from megavit.data.config import DataConfig
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sampler import SampleKey
from megavit.data.sources.digits import Digits
from megavit.data.transforms.normalize import Normalize, draw_shifts, shift_image
from megavit.errors import ConfigError


def make_loader(*, dp=1, dp_rank=0, micro_batch=4, train=True, workers=0, shift=1, fields=None) -> Loader:
    layout = SimpleNamespace(
        tp=1, tp_rank=0, pp=1, vpp=1, dp=dp, dp_rank=dp_rank, device=torch.device("cpu"), groups=None
    )
    return Loader(
        Digits("train"),
        DataConfig(random_shift=shift, workers=workers),
        layout=layout,
        fields=fields or RequiredFields(images=True, targets=("labels",)),
        micro_batch=micro_batch,
        seed=3,
        train=train,
    )


def by_sample(loaders, **position):
    seen = {}
    for loader in loaders:
        for batch in loader.train_batches(**position):
            for i, key in enumerate(batch.keys):
                seen[key] = (batch.images_BCYX[i], int(batch.targets["labels"][i]))
    return seen


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, (image, label) in one.items():
        assert torch.equal(image, other[key][0])
        assert label == other[key][1]


@pytest.mark.parametrize(("dp", "micro_batch", "workers"), [(2, 4, 0), (4, 2, 0), (1, 16, 0), (2, 4, 2)])
def test_a_step_holds_the_same_augmented_samples_in_any_division(dp, micro_batch, workers):
    # 1437 samples: steps 88 to 91 of 16 span the end of the first epoch.
    position = dict(consumed_samples=88 * 16, num_steps=3, global_batch=16)
    want = by_sample([make_loader(micro_batch=16)], **position)
    divided = [make_loader(dp=dp, dp_rank=r, micro_batch=micro_batch, workers=workers) for r in range(dp)]
    assert len(want) == 48
    assert {key.epoch for key in want} == {0, 1}
    assert_same(by_sample(divided, **position), want)


def test_continuing_from_a_position_repeats_and_skips_nothing():
    complete = by_sample([make_loader()], consumed_samples=0, num_steps=4, global_batch=16)
    first = by_sample([make_loader()], consumed_samples=0, num_steps=1, global_batch=16)
    rest = by_sample([make_loader()], consumed_samples=16, num_steps=3, global_batch=16)
    assert not first.keys() & rest.keys()
    assert_same(first | rest, complete)


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_evaluation_covers_every_sample_once(dp):
    loaders = [make_loader(dp=dp, dp_rank=r, micro_batch=32, train=False) for r in range(dp)]
    counted = []
    for loader in loaders:
        batches = list(loader.evaluation_batches())
        assert len(batches) == loader.num_evaluation_batches
        counted += [
            key.sample_id
            for batch in batches
            for key, counts in zip(batch.keys, batch.counted_B, strict=True)
            if counts
        ]
    assert sorted(counted) == list(range(1437))


def test_a_stage_that_needs_only_labels_decodes_no_image():
    loader = make_loader(fields=RequiredFields(images=False, targets=("labels",)))
    loader.source.image = None  # a call would fail
    batch = next(loader.train_batches(consumed_samples=0, num_steps=1, global_batch=4))
    assert batch.images_BCYX is None
    assert batch.targets["labels"].shape == (4,)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_error_arrives_as_itself_also_from_a_worker_process(workers):
    loader = make_loader(workers=workers)
    loader.source.image = broken_image
    with pytest.raises(ConfigError, match=r"^sample \d+ is broken$"):
        list(loader.train_batches(consumed_samples=0, num_steps=2, global_batch=4))


def broken_image(index):
    raise ConfigError(f"sample {index} is broken")


def test_shifts_cover_their_range_evenly_and_depend_on_the_epoch():
    keys = [SampleKey(i, 0) for i in range(9000)]
    shifts = torch.tensor(draw_shifts(keys, pixels=1, seed=0))
    pairs = (shifts[:, 0] + 1) * 3 + shifts[:, 1] + 1
    counts = torch.bincount(pairs, minlength=9)
    assert len(counts) == 9
    # 1000 expected, standard deviation 30.
    assert (counts - 1000).abs().max() < 150
    assert shifts.tolist() != draw_shifts([SampleKey(i, 1) for i in range(9000)], pixels=1, seed=0)


def test_shift_moves_pixels_down_and_across():
    image = torch.zeros(1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1] = 7
    assert shift_image(image, 1, 1)[0].tolist() == [[0, 0, 0], [0, 0, 7], [0, 0, 0]]
    assert shift_image(image, -1, 0).sum() == 0


def test_normalize_divides_by_each_channels_deviation():
    images = torch.full((1, 2, 1, 1), 255, dtype=torch.uint8)
    assert Normalize([0.5, 0.0], [0.5, 2.0])(images).flatten().tolist() == [1.0, 0.5]


def test_digits_are_split_once_and_for_all():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    assert len(train.classes) == 10
    assert train.image(0).shape == (1, 8, 8)
    assert train.image(0).dtype == torch.uint8
    assert sorted({val.label(i) for i in range(len(val))}) == list(range(10))
    together = {bytes(s.image(i).numpy().tobytes()) for s in (train, val) for i in range(len(s))}
    # A few digits occur twice in the data set; nearly all are different.
    assert len(together) > 1780
