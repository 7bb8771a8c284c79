"""Kill a rank at any moment: the job ends soon, the same command continues it, and the result is bit-equal."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.data.hashing import hashes, train_and_hash
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.runtime.test_signals import STOPPED, losses, start

EVERY = 4
GONE_S = 15
BATCH = 16

# Everything that is random in a step: dropout, and images shifted, mixed and erased by two workers.
SETTINGS = [
    "run.ranks=2", "parallel.tp=2", "model.hidden_dropout=0.1", f"checkpoint.save_every={EVERY}",
    "data.workers=2", "data.random_shift=1", "data.mixup=0.8", "data.cutmix=1", "data.random_erasing=0.25",
    "task.implementation=tests.data.hashing:Hashing",
]  # fmt: skip


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    return [child for child in launcher.children() if "megavit.train" in child.cmdline()]


def wait_for(what, *, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.002)
    return False


def newest(run_dir: Path) -> int:
    return max((int(path.name[-8:]) for path in (run_dir / "checkpoints").glob("step_*")), default=0)


def saving(run_dir: Path, *, since: float) -> bool:
    """Return whether a save is in progress; the remains of a killed save are older."""
    try:
        return any(path.stat().st_ctime > since for path in (run_dir / "checkpoints").glob(".step_*.tmp"))
    except FileNotFoundError:
        return False


def kill_again_and_again(run_dir: Path, numbers: range, *, seed: int, figure) -> None:
    """Kill a rank during a save, after one, or at a random moment; then compare with an uninterrupted run.

    Args:
        run_dir: the run's folder.
        numbers: one start for each; odd ones save in the background. Multiples of 3 are killed at a random moment, the
            others during their first save (1, 4, ...) or just after it (2, 5, ...).
        seed: of the moments and the ranks.
        figure: records the measured figures.
    """
    draw = random.Random(seed)
    gone_s, in_saves = [], 0
    for number in numbers:
        in_background = f"checkpoint.async_save={str(number % 2 == 1).lower()}"
        running = start(run_dir, *SETTINGS, "checkpoint.keep_last=3", in_background)
        launcher, before, started = psutil.Process(running.pid), newest(run_dir), time.time()
        if number % 3 == 0:
            time.sleep(draw.uniform(1, 9))
        else:
            # During the first save of this start, or just after it.
            assert wait_for(lambda since=started: saving(run_dir, since=since), timeout_s=60)
            if number % 3 == 2:
                assert wait_for(lambda old=before: newest(run_dir) > old, timeout_s=60)
            else:
                time.sleep(draw.uniform(0, 0.3))
        everyone = [launcher, *launcher.children(recursive=True)]
        victims = ranks_of(launcher)
        in_saves += saving(run_dir, since=started)
        killed = time.monotonic()
        (draw.choice(victims) if victims else launcher).send_signal(signal.SIGKILL)
        _, output = running.communicate(timeout=60)
        assert running.returncode != 0
        assert wait_for(lambda those=everyone: not any(map(alive, those)), timeout_s=GONE_S), output
        gone_s.append(time.monotonic() - killed)
        # The last checkpoint stays and only the steps after it are lost: those of one interval, and those during the
        # background write, for which the next save waits.
        reached = max(losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0
        assert newest(run_dir) >= before
        assert reached - newest(run_dir) <= EVERY * (1 + number % 2)
    step = newest(run_dir) + EVERY
    last = start(run_dir, *SETTINGS, f"train.stop_at={step}")
    _, output = last.communicate(timeout=240)
    assert last.returncode == STOPPED, output
    full = [*SMALL, "train.steps=1000000", *SETTINGS, f"train.stop_at={step}", f"run.dir={run_dir.parent / 'full'}"]
    left_alone = run_ranks(train_and_hash, 2, full, run_dir.parent / "due", timeout_s=300)[0]["losses"]
    assert losses(run_dir) == left_alone
    seen, due = hashes(Path(os.environ["HASHES"])), hashes(run_dir.parent / "due")
    assert len(due) == step * BATCH
    # The samples after the last save of a killed run were read again.
    assert {key: seen.get(key) for key in due} == due
    assert max(gone_s) <= GONE_S
    figure(
        f"{len(numbers)} ranks killed, {in_saves} of them in a save: {step} steps and "
        f"{len(due)} images equal those of a run left alone, every process gone after {max(gone_s):.1f} s at most"
    )


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def hashes_of_images(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHES", str(tmp_path / "hashes"))


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_save(tmp_path, figure):
    kill_again_and_again(tmp_path / "run", range(1, 2), seed=0, figure=figure)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_killed_ranks(tmp_path, figure):
    kill_again_and_again(tmp_path / "run", range(20), seed=1, figure=figure)
