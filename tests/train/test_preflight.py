"""Test that the preflight finds errors that would occur later, and changes nothing in the run."""

import os
import re
from types import SimpleNamespace

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.resolved import resolve_run
from megavit.errors import ConfigError
from megavit.train import preflight
from megavit.train.preflight import check_batch
from tests.distributed import RankFailed, run_ranks
from tests.ranks import train_and_keep
from tests.reference import SMALL

OVERLAPPED = ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"]
LAYOUTS = {
    "TP 2, dropout, average": (2, ["parallel.tp=2", "model.hidden_dropout=0.1", "optim.ema=0.9"]),
    "DP 2, bf16, overlapped": (2, ["train.precision=bf16_o2", *OVERLAPPED]),
    "one rank, SGD": (1, ["optim=sgd", "optim.lr=0.1", "optim.warmup_steps=2"]),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("DP 2") else name for name in LAYOUTS]
)
def test_a_rehearsed_run_is_the_same_to_the_bit(layout, tmp_path):
    ranks, overrides = LAYOUTS[layout]
    runs = {}
    for preflight_ran in ("true", "false"):
        run_dir = tmp_path / preflight_ran
        keys = [*SMALL, *overrides, "train.steps=4", f"run.preflight={preflight_ran}", f"run.dir={run_dir}"]
        runs[preflight_ran] = run_ranks(train_and_keep, ranks, keys)
        assert ("preflight: a step" in (run_dir / "train.log").read_text()) is (preflight_ran == "true")
        assert not (run_dir / ".preflight").exists()
    for one, other in zip(runs["true"], runs["false"], strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in other["weights"])
        assert all(torch.equal(a, b) for a, b in zip(one["averages"], other["averages"], strict=True))
        for states in zip(one["optimizer"], other["optimizer"], strict=True):
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
        assert one["groups"] == other["groups"]


def refused(run_dir, *overrides: str, ranks: int = 1) -> str:
    with pytest.raises(RankFailed) as failure:
        run_ranks(train_and_keep, ranks, [*SMALL, "run.preflight=true", f"run.dir={run_dir}", *overrides])
    return str(failure.value)


def test_checkpoints_that_the_disk_cannot_hold_are_refused_with_the_arithmetic(tmp_path):
    message = refused(tmp_path, "train.steps=1000000000", "checkpoint.save_every=1")
    assert "ConfigError" in message
    assert "has no room for 1000000000 checkpoints of about " in message
    assert "raise checkpoint.save_every, set checkpoint.keep_last=3, free space, or choose another run.dir" in message


def check_another_folder(run_dir: str) -> str:
    """Two ranks that mean different folders by one name, as nodes without a shared file system do."""
    from pathlib import Path

    import torch.distributed as dist

    from megavit.config.experiment import ExperimentConfig
    from megavit.parallel.layout import ParallelLayout, rank_from_environment
    from megavit.train.preflight import check_folder

    config = ExperimentConfig()
    ParallelLayout.create(config.parallel, timeout_s=60)
    rank = rank_from_environment()
    try:
        check_folder(Path(run_dir) / str(rank), rank=rank)
    except ConfigError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def test_ranks_that_do_not_share_a_folder_are_reported(tmp_path):
    first, second = run_ranks(check_another_folder, 2, str(tmp_path))
    assert first == second
    assert "rank 1 on " in first
    assert "does not see what rank 0 has written; all nodes need the same folder" in first


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_in_the_preflight_is_reported_and_nothing_is_left(small_disk):
    disk = small_disk("300k")
    # The arithmetic is content, as it may be where others fill the same disk.
    message = refused_without_arithmetic(disk)
    assert "ConfigError" in message
    assert ".preflight/step_00000000 cannot be written: No space left on device on " in message
    assert "; there was no earlier checkpoint" in message
    assert not list(disk.rglob("*.distcp"))


def train_on_a_full_disk(overrides: list[str]) -> None:
    from megavit.train import preflight

    preflight.check_disk = lambda *_, **__: ""
    train_and_keep(overrides)


def refused_without_arithmetic(disk) -> str:
    with pytest.raises(RankFailed) as failure:
        run_ranks(train_on_a_full_disk, 2, [*SMALL, "parallel.tp=2", "run.preflight=true", f"run.dir={disk / 'run'}"])
    return str(failure.value)


def test_a_batch_above_the_training_set_is_refused_with_the_arithmetic(tmp_path):
    message = refused(tmp_path, "data.classes=[1,2]", "data.samples_per_class=5", "train.global_batch=12")
    assert "train.global_batch=12 is more than the 10 training images of data.source=digits" in message


@pytest.mark.parametrize(
    ("settings", "arithmetic"),
    [
        ([], r"10,000 images × 3 channels × 224 × 224 × 9 bytes \(uint8, and fp32 twice\) = 13.5 GB"),
        (["data.workers=2"], r"× \(9 bytes \(.*\) \+ 4 bytes \(uint8, read ahead by 2 data.workers\)\) = 19.6 GB"),
        (["train.micro_batch=1000"], None),
    ],
)
def test_images_that_the_memory_cannot_hold_are_refused_with_the_arithmetic(settings, arithmetic, monkeypatch):
    config = compose(["data=synthetic", "train.global_batch=10000", "train.steps=1", *settings])
    layout = SimpleNamespace(world_size=1, pp=1, tp_rank=0, device=torch.device("cpu"), holds_first_stage=True)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 2_000_000_000)
    monkeypatch.setattr(preflight, "raise_on_all_ranks", lambda output: found.append(output))
    found: list[str | None] = []
    check_batch(config, layout, resolve_run(config, 1, num_classes=10, num_samples=10_000))
    if arithmetic is None:
        assert found == [None]
    else:
        assert re.search(arithmetic, found[0])
        assert "and 2 GB is free in the memory of" in found[0] and "set train.micro_batch to less than 1," in found[0]
