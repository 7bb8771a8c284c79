"""Stop a run by a signal at any moment: it saves, exits with 75, and its continuation is bit-equal."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest

from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL

STOPPED = 75


def start(run_dir, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megavit", "train", *SMALL, "train.steps=1000000", f"run.dir={run_dir}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MEGAVIT_DEVICE": "cpu"},
    )


def losses(run_dir) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def undisturbed(run_dir, *overrides: str) -> dict[int, float]:
    """Return the losses of the same run on two ranks, without a signal."""
    settings = [*SMALL, "train.steps=1000000", *overrides, f"run.dir={run_dir}"]
    return run_ranks(ranks.train_and_keep, 2, settings, timeout_s=300)[0]["losses"]


LAYOUT = ["run.ranks=2", "parallel.tp=2", "model.hidden_dropout=0.1"]


def stop_and_save(run_dir, *, wait: Callable[[], None], signal_number: int) -> float:
    """Start the run or go on with it, wait, and signal it; the seconds until it has saved and left with 75."""
    running = start(run_dir, *LAYOUT)
    wait()
    asked = time.monotonic()
    running.send_signal(signal_number)
    out, err = running.communicate(timeout=120)
    left_s = time.monotonic() - asked
    assert running.returncode == STOPPED, err
    assert "Traceback" not in err
    assert out.count("saved; run again to continue") == 1
    return left_s


def saved_step(run_dir) -> int:
    return int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))


def interrupt(run_dir, moments: list[tuple[Callable[[], None], int]], *, figure) -> None:
    """Start a run again and again, and signal each at its moment; then compare with one that ran through."""
    left_s, step = [], 0
    for wait, signal_number in moments:
        left_s.append(stop_and_save(run_dir, wait=wait, signal_number=signal_number))
        assert saved_step(run_dir) > step
        step = saved_step(run_dir)
    assert losses(run_dir) == undisturbed(run_dir.parent / "whole", *LAYOUT, f"train.stop_at={step}")
    figure(f"{len(moments)} signals, TP 2: all left with 75, the last step {step}, {max(left_s):.1f} s at most")


def wait_for_steps(run_dir, count: int) -> None:
    deadline = time.monotonic() + 240  # a start takes a minute on a machine with a load of 40
    while not (run_dir / "metrics.jsonl").exists() or max(losses(run_dir), default=0) < count:
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.05)


def test_signals_in_the_start_and_in_training_stop_save_and_change_no_bit(tmp_path, figure):
    run_dir = tmp_path / "run"
    interrupt(
        run_dir,
        [
            (lambda: wait_for_steps(run_dir, 5), signal.SIGINT),
            # The ranks still import.
            (lambda: time.sleep(1), signal.SIGTERM),
        ],
        figure=figure,
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_signals_at_random_moments(tmp_path, figure):
    draw = random.Random(1)
    moments = [
        (partial(time.sleep, draw.uniform(0.3, 14)), draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
        for _ in range(20)
    ]
    interrupt(tmp_path / "run", moments, figure=figure)


def test_a_second_interrupt_leaves_at_once(tmp_path):
    # The step is so long that the first interrupt has no effect yet.
    running = start(tmp_path, "run.ranks=1", "model.num_layers=200", "model.hidden_size=512", "train.global_batch=256")
    deadline = time.monotonic() + 60
    while not (tmp_path / "train.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 1
    assert err.count("megavit: ended at once") == 1
    assert "Traceback" not in err
