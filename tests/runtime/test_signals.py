"""Stop a run by a signal at any moment: it saves, exits with 75, and its continuation is bit-equal."""

import json
import os
import random
import signal
import subprocess
import sys
import time

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


def interrupt(run_dir, *, times: int, latest_s: float, seed: int, figure) -> None:
    """Restart a run repeatedly, signal each start at a random moment, and compare with an uninterrupted run."""
    draw, layout = random.Random(seed), ["run.ranks=2", "parallel.tp=2", "model.hidden_dropout=0.1"]
    left_s, step = [], 0
    for _ in range(times):
        running = start(run_dir, *layout)
        time.sleep(draw.uniform(0.3, latest_s))
        asked = time.monotonic()
        running.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
        out, err = running.communicate(timeout=120)
        left_s.append(time.monotonic() - asked)
        assert running.returncode == STOPPED, err
        assert "Traceback" not in err
        assert out.count("saved; run again to continue") == 1
        saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
        assert saved > step
        step = saved
    assert losses(run_dir) == undisturbed(run_dir.parent / "whole", *layout, f"train.stop_at={step}")
    figure(
        f"{times} signals at random moments, TP 2: all left with 75, the last step {step}, {max(left_s):.1f} s at most"
    )


def test_signals_at_random_moments_stop_save_and_change_no_bit(tmp_path, figure):
    interrupt(tmp_path / "run", times=3, latest_s=8, seed=0, figure=figure)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_signals_at_random_moments(tmp_path, figure):
    interrupt(tmp_path / "run", times=20, latest_s=14, seed=1, figure=figure)


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
