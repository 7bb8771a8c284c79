"""Test that the best checkpoint is kept in addition to the latest."""

import json

import pytest

from megavit.task.base import MonitoredMetric
from tests.distributed import run_ranks
from tests.reference import SMALL

TOP1, RATIO = MonitoredMetric("top1", higher=True), MonitoredMetric("loss_ratio", higher=False)


@pytest.mark.parametrize(
    ("monitor", "found", "than", "better"),
    [
        (TOP1, {"top1": 0.5}, {}, True),
        (TOP1, {"top1": 0.5}, {"top1": 0.5}, False),
        (TOP1, {"top1": 0.6}, {"top1": 0.5}, True),
        (RATIO, {"loss_ratio": 0.6}, {"loss_ratio": 0.5}, False),
        (RATIO, {"loss_ratio": 0.4}, {"loss_ratio": 0.5}, True),
        (RATIO, {"loss_ratio": float("nan")}, {}, False),
        (RATIO, {"loss_ratio": float("nan")}, {"loss_ratio": 0.5}, False),
        (TOP1, {"top1": 0.9, "ema_top1": 0.4}, {"top1": 0.5, "ema_top1": 0.5}, False),
        (TOP1, {"top1": 0.1, "ema_top1": 0.6}, {"top1": 0.5, "ema_top1": 0.5}, True),
        (TOP1, {}, {}, False),
    ],
)
def test_better_is_what_the_task_wants(monitor, found, than, better):
    assert monitor.is_better(found, than=than) is better


# Of each evaluation, every second step.
TOP1_AT = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.5, 10: 0.4, 12: 0.5}


def train_with_results(overrides: list[str], results: dict[int, float]) -> float:
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    class ScriptedTrainer(Trainer):
        def evaluate(self) -> dict[str, float]:
            return {"loss": 1.0, "top1": results[self.step], "count": 360.0}

    trainer = ScriptedTrainer(compose(overrides))
    trainer.run()
    return trainer.best_validation["top1"]


def checkpoints(run_dir) -> tuple[list[int], int, int]:
    """Return the steps of the existing checkpoints, of the latest and of the best."""
    folder = run_dir / "checkpoints"
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))
    latest, best = (int((folder / name).read_text().removeprefix("step_")) for name in ("latest", "best"))
    return steps, latest, best


def test_each_better_evaluation_saves_and_the_former_best_goes_unless_it_was_due(tmp_path):
    overrides = [*SMALL, "train.eval_every=2", "checkpoint.save_every=4", "checkpoint.best=true", f"run.dir={tmp_path}"]
    stopped = [*overrides, "train.steps=12", "train.stop_at=6"]
    assert run_ranks(train_with_results, 1, stopped, TOP1_AT)[0] == 0.3
    # Step 2 was saved only as the best so far, and was removed; 4 is periodic, and 6 is the last step.
    assert checkpoints(tmp_path) == ([4, 6], 6, 4)
    assert run_ranks(train_with_results, 1, [*overrides, "train.steps=12"], TOP1_AT)[0] == 0.5
    assert checkpoints(tmp_path) == ([4, 6, 8, 12], 12, 8)
    state = json.loads((tmp_path / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert (state["metrics"]["top1"], state["due"]) == (0.5, True)


def test_without_periodic_saves_only_the_best_and_the_last_stay(tmp_path):
    overrides = [*SMALL, "train.eval_every=2", "checkpoint.best=true", "train.steps=12", f"run.dir={tmp_path}"]
    run_ranks(train_with_results, 1, overrides, TOP1_AT)
    assert checkpoints(tmp_path) == ([8, 12], 12, 8)
    from megavit.checkpoint.find import find_checkpoint

    assert find_checkpoint(tmp_path / "checkpoints" / "best").name == "step_00000008"
    assert find_checkpoint(tmp_path).name == "step_00000012"
