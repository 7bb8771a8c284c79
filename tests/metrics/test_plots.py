"""A run's curves; each step of a crashed and resumed run is drawn once."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megavit.metrics.config import MetricsConfig
from megavit.metrics.logger import MetricLogger
from megavit.metrics.plots import draw_curves
from megavit.metrics.task_metric import TaskMetric

RATIO = TaskMetric("loss_ratio", "of the mean image's", "loss / loss of the mean image", ".3f", higher=False)


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Draw rows and return the axes of the loss and of the task's metric, as they would be saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(rows: list[dict]):
        lines = tmp_path / "metrics.jsonl"
        lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        draw_curves(lines, tmp_path / "curves.png", task_metrics=(RATIO,))
        figures[-1].canvas.draw()
        return figures[-1].axes

    return draw


def rows_of(losses: dict[int, float], **more: float) -> list[dict]:
    return [{"step": step, "split": "train", "loss": loss, **more} for step, loss in losses.items()]


@pytest.mark.parametrize(
    ("losses", "want"),
    [
        ({1: 2.5, 2: 0.4}, ["0.5", "1", "2"]),
        ({1: 3000, 2: 8}, ["10", "20", "50", "100", "200", "500", "1000", "2000"]),
        # The axis contains neither 1, 2 nor 5.
        ({1: 0.69, 2: 0.61}, [f"0.{hundredths}" for hundredths in range(61, 70)]),
        ({1: 0.0, 2: 0.0}, None),
    ],
)
def test_a_log_axis_reads_1_2_5_or_round_numbers(losses, want, axes_of):
    axes = axes_of(rows_of(losses))[0]
    low, high = axes.get_ylim()
    labels = [text.get_text() for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert want is None or labels == want
    assert {text.get_text() for text in axes.get_yticklabels(minor=True)} <= {""}


def test_the_axis_of_the_ratio_excludes_the_start(axes_of):
    ratios = {step: 0.55 + 4 * 0.97**step for step in range(10, 1001, 10)}
    rows = [{"step": step, "split": "train", "loss": 1.0, "loss_ratio": ratio} for step, ratio in ratios.items()]
    rows.append({"step": 1000, "split": "val", "loss": 1.0, "loss_ratio": 0.5})
    low, high = axes_of(rows)[1].get_ylim()
    # The first point is 3.5; the largest after 100 steps 0.69.
    assert (low, high) == (pytest.approx(0.5, abs=0.03), pytest.approx(ratios[110], abs=0.03))
    assert axes_of(rows[:1])[1].lines


def test_the_curve_of_a_crashed_run_continues_from_the_resumed_step(axes_of):
    before, after = rows_of(dict.fromkeys((50, 100, 160, 170), 2.0)), rows_of(dict.fromkeys((155, 165, 175), 1.0))
    (line,) = axes_of([*before, *after])[0].lines
    assert line.get_xdata().tolist() == [50, 100, 155, 165, 175]
    assert line.get_ydata().tolist() == [2, 2, 1, 1, 1]


def report(run_dir: Path, steps: range, *, loss: float) -> None:
    """Write a process's lines for the steps that it did."""
    logger = MetricLogger(
        MetricsConfig(),
        run_dir,
        is_main=True,
        name="run",
        settings={},
        task_metrics=(RATIO,),
        first_step=steps.start - 1,
        num_steps=20,
    )
    with logger:
        for step in steps:
            logger.advance(step)
            logger.log(step, "train", {"loss": loss})


def test_tensorboard_shows_each_step_of_a_crashed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, range(1, 18), loss=2.0)
    report(tmp_path, range(16, 21), loss=1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 21))
    assert [event.value for event in found] == [2.0] * 15 + [1.0] * 5


def test_the_progress_bar_estimates_from_the_first_step_and_then_without_it(monkeypatch):
    from megavit.metrics import logger

    seconds = iter([100.0, 130.0, 132.0, 136.0])
    monkeypatch.setattr(logger.time, "monotonic", lambda: next(seconds))
    # Resume at step 1,000 of 5,000. The first step takes 30 s, each of the next three 2 s.
    clock = logger._Clock(1000, 5000)
    assert [clock.left_at(step) for step in (1001, 1002, 1004)] == ["33:19:30 left", "2:13:16 left", "2:13:12 left"]
