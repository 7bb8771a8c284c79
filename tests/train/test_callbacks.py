"""Callbacks of the trainer: one report at the end of each step."""

import json
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.reference import SMALL


def reports_of(overrides: list[str], leave_after: int) -> dict:
    """Train with two callbacks, the second of which raises after a step."""
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    reports, calls = [], []

    def collect(report) -> None:
        reports.append((report.step, trainer.task.metrics(trainer.engine.totals(report.sums)), report.grad_norm))
        calls.append(f"first {report.step}")

    def leave(report) -> None:
        calls.append(f"second {report.step}")
        if report.step == leave_after:
            raise KeyError(report.step)

    trainer = Trainer(compose(overrides), on_step_end=[collect, leave], evaluates=False, saves=False)
    with pytest.raises(KeyError):
        trainer.run()
    return {"reports": reports, "calls": calls, "step": trainer.step}


def test_a_report_holds_the_loss_and_the_norm_that_are_logged(tmp_path):
    result = run_ranks(reports_of, 1, [*SMALL, f"run.dir={tmp_path}"], 3)[0]
    assert result["calls"] == ["first 1", "second 1", "first 2", "second 2", "first 3", "second 3"]
    assert result["step"] == 3
    rows = [json.loads(line) for line in (Path(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in rows] == [
        (step, metrics["loss"], norm) for step, metrics, norm in result["reports"]
    ]


def test_a_run_that_neither_evaluates_nor_saves_logs_and_writes_neither(tmp_path):
    from tests import ranks

    assert run_ranks(ranks.train, 1, [*SMALL, "train.steps=3", f"run.dir={tmp_path}"])[0]["validation"] == []
    assert not list(tmp_path.glob("checkpoints/step_*"))
