"""Images that cannot be read, and workers that die while reading."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from megavit.data import prefetch as reading
from megavit.data.config import DataConfig, OnBadSample
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources.digits import Digits
from megavit.data.transforms import resize
from megavit.errors import ConfigError
from tests import ranks
from tests.distributed import RankFailed, run_ranks
from tests.reference import SMALL

SKIP = {"on_bad_sample": OnBadSample.skip, "max_bad_fraction": 0.5}


class Broken(Digits):
    """Digits, some of which cannot be read."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__("train")
        self.bad = bad

    def image(self, index):
        if index in self.bad:
            raise ConfigError(f"digit {index} is broken")
        return super().image(index)

    def name(self, index):
        return f"digit {index}"


def make_loader(source, *, dp=1, dp_rank=0, micro_batch=8, fields=None, **settings) -> Loader:
    layout = SimpleNamespace(
        tp=1, tp_rank=0, pp=1, vpp=1, dp=dp, dp_rank=dp_rank, device=torch.device("cpu"), groups=None
    )
    fields = fields or RequiredFields(images=True, targets=("labels",))
    config = DataConfig(random_shift=1, **settings)
    return Loader(source, config, layout=layout, fields=fields, micro_batch=micro_batch, seed=3, train=True)


def read(loaders, num_steps=4):
    """Return images and labels by key, and the replaced samples."""
    seen, replaced = {}, {}
    for loader in loaders:
        for batch in loader.train_batches(consumed_samples=0, num_steps=num_steps, global_batch=16):
            labels = [None] * len(batch.keys) if "labels" not in batch.targets else batch.targets["labels"].tolist()
            images = [None] * len(batch.keys) if batch.images_BCYX is None else batch.images_BCYX
            seen |= dict(zip(batch.keys, zip(images, labels, strict=True), strict=True))
        replaced |= {bad.sample_id: bad.replaced_by for bad in loader.pop_bad_samples()}
    return seen, replaced


def due(count: int) -> list[int]:
    return [make_loader(Digits("train")).order.at(position).sample_id for position in range(count)]


@pytest.mark.parametrize(("dp", "micro_batch", "workers"), [(2, 8, 0), (4, 4, 0), (1, 16, 2)])
def test_a_bad_image_has_the_same_replacement_in_any_division(dp, micro_batch, workers):
    source = Broken(set(due(64)[::7]))
    want, replaced = read([make_loader(source, **SKIP)])
    assert replaced.keys() == source.bad
    assert all(source.label(bad) == source.label(other) for bad, other in replaced.items())
    loaders = [
        make_loader(source, dp=dp, dp_rank=rank, micro_batch=micro_batch, workers=workers, **SKIP) for rank in range(dp)
    ]
    got, also_replaced = read(loaders)
    assert also_replaced == replaced
    assert got.keys() == want.keys()
    assert all(torch.equal(image, got[key][0]) and label == got[key][1] for key, (image, label) in want.items())


def test_a_stage_that_reads_only_labels_has_those_of_the_replacements():
    source = Broken(set(due(64)[::7]))
    full, _ = read([make_loader(source, **SKIP)])
    labels, replaced = read([make_loader(source, fields=RequiredFields(images=False, targets=("labels",)), **SKIP)])
    assert {key: label for key, (_, label) in full.items()} == {key: label for key, (_, label) in labels.items()}
    assert replaced == {}


def test_a_replacement_may_be_bad_too():
    zeros = {index for index in range(1437) if Digits("train").label(index) == 0}
    # All but 40 of 143 zeros are broken: about one in four can be read.
    source = Broken(set(sorted(zeros)[40:]))
    seen, replaced = read([make_loader(source, **SKIP)])
    assert len(seen) == 64
    assert replaced
    assert set(replaced.values()) <= zeros - source.bad
    with pytest.raises(ConfigError, match=r"^digit \d+ is broken; 20 replacements of its class cannot be read"):
        read([make_loader(Broken(zeros), **SKIP)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (SKIP | {"max_bad_fraction": None}, "needs data.max_bad_fraction"),
        ({"max_bad_fraction": 0.1}, "would be ignored by data.on_bad_sample=stop"),
        (SKIP | {"max_bad_fraction": 1.5}, "data.max_bad_fraction=1.5"),
        ({"repeats": 0}, "data.repeats=0"),
        ({"timeout_s": 0.0}, "data.timeout_s=0"),
    ],
)
def test_wrong_settings_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        DataConfig(**changes).check()


class Deadly(Broken):
    def image(self, index):
        if index in self.bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return Digits.image(self, index)


class Slow(Digits):
    def __init__(self, bad: set[int], delay_s: float = 12) -> None:
        super().__init__("train")
        self.bad, self.delay_s = bad, delay_s

    def image(self, index):
        if index in self.bad:
            time.sleep(self.delay_s)
        return super().image(index)

    def name(self, index):
        return f"digit {index}"


class Faulty(Digits):
    def image(self, index):
        return 1 / 0


@pytest.fixture
def looks_often(monkeypatch):
    monkeypatch.setattr(reading, "_LOOK_S", 1.0)


@pytest.mark.parametrize(
    ("kind", "output"), [(Deadly, "a loading process died"), (Slow, r"no micro batch came for \d+ s")]
)
def test_the_image_of_a_worker_that_dies_or_hangs_is_named(kind, output, looks_often):
    bad = due(64)[37]
    loader = make_loader(kind({bad}), workers=2, timeout_s=5.0)
    with pytest.raises(RuntimeError, match=rf"{output}; being read: .*digit {bad}") as raised:
        read([loader])
    assert "lower data.workers" in str(raised.value)


@pytest.mark.slow
def test_slow_reading_within_the_time_is_waited_for(looks_often):
    bad = due(64)[5]
    loader = make_loader(Slow({bad}, delay_s=2.5), workers=1, timeout_s=60.0)
    assert len(read([loader])[0]) == 64


def test_a_fault_in_a_source_keeps_its_own_stack():
    loader = make_loader(Faulty("train"), workers=1)
    with pytest.raises(ZeroDivisionError):
        read([loader])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Write two classes of twelve training images and a validation image; one image of each split cannot be read."""
    root = tmp_path_factory.mktemp("photographs")
    for label in "ab":
        for part, count in (("train", 12), ("val", 4)):
            for number in range(count):
                path = root / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((8, 8), 20 + 5 * number).convert("RGB").save(path)
    (root / "train" / "a" / "3.png").write_bytes(b"no image")
    (root / "val" / "b" / "1.png").write_bytes(b"")
    return root


def run_settings(photographs: Path, run_dir: Path, *more: str) -> list[str]:
    own = ["model=vit_ti16", "model.patch_size=4", "data.image_size=[8,8]", "data.val_fraction=null", "data.workers=0"]
    size = ["train.steps=4", "train.global_batch=16", "train.micro_batch=4", "train.eval_every=4"]
    skips = ["data.on_bad_sample=skip", "data.max_bad_fraction=0.2"]
    return [*SMALL, f"data.path={photographs}", *own, *SMALL[:4], *size, *skips, f"run.dir={run_dir}", *more]


def test_in_every_layout_the_run_continues_and_names_and_counts_them(photographs, tmp_path, figure):
    losses = {}
    for name, (count, layout) in {
        "one": (1, []), "PP 2": (2, ["parallel.pp=2"]), "TP 2 × DP 2": (4, ["parallel.tp=2"]),
    }.items():  # fmt: skip
        run_dir = tmp_path / f"of_{count}"
        run_ranks(ranks.train_and_evaluate, count, run_settings(photographs, run_dir, *layout))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if row["split"] != "save"]
        assert {row["bad_samples"] for row in rows if row["split"] == "val"} == {1}
        # 64 images are more than two epochs of 24.
        assert [row["bad_samples"] for row in rows if row["split"] == "train"][-1] == 1
        log = (run_dir / "train.log").read_text()
        assert log.count("a/3.png cannot be read as an image: Pillow does not know its format") == 1
        assert log.count("b/1.png cannot be read") == 1
        listed = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
        assert [row["split"] for row in listed] == ["train", "val"]
    largest = max(abs(a - b) for some in losses.values() for a, b in zip(losses["one"], some, strict=True))
    figure(f"bad images replaced at {', '.join(losses)}: largest |Δloss| {largest:.1e}")
    assert largest <= 1e-6


def test_too_many_stop_the_run_on_every_rank(photographs, tmp_path):
    settings = run_settings(photographs, tmp_path / "run", "data.max_bad_fraction=0.01")
    with pytest.raises(RankFailed) as failed:
        run_ranks(ranks.train_and_evaluate, 2, settings)
    message = (
        "1 of 24 train images are bad, 4.17%, and data.max_bad_fraction=0.01 allows 0; "
        f"{tmp_path / 'run'}/bad_samples.jsonl lists them"
    )
    assert str(failed.value).count(message) == 2


class Towers(Broken):
    """Digits, some of which are one pixel wide and far too high."""

    def image(self, index):
        return torch.zeros(1, 300, 1, dtype=torch.uint8) if index in self.bad else Digits.image(self, index)


def no_memory_for_towers(image, size, *_, **__):
    if image.shape[1] == 300:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 11796480000 bytes")
    return image


@pytest.mark.parametrize(
    ("patched", "reason"),
    [
        ((resize.functional, "resize", no_memory_for_towers), "DefaultCPUAllocator: can't allocate memory"),
        ((resize, "_MAX_PIXELS", 1000), "resizing its 1 × 300 pixels to 8 × 8 needs an intermediate image of 8 × 300"),
    ],
)
def test_an_image_that_is_too_large_to_be_resized_is_named_and_can_be_skipped(patched, reason, monkeypatch):
    monkeypatch.setattr(*patched)
    source = Towers(set(due(64)[::7]))
    seen, replaced = read([make_loader(source, **SKIP)])
    assert len(seen) == 64
    assert replaced.keys() == source.bad
    with pytest.raises(ConfigError, match=rf"^digit \d+ cannot be resized: {reason}"):
        read([make_loader(source)])
