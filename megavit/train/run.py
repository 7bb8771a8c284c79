"""A run's folder as a Python object: its metrics, its best checkpoint, its curves."""

import html
import io
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.config.experiment import ExperimentConfig
from megavit.config.saved import from_yaml
from megavit.errors import ConfigError
from megavit.metrics.rows import read_rows, without_repeated
from megavit.runtime.run_dir import FINISHED, STOPPED

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from megavit.task.base import Task

_SPLITS = ("train", "val", "save")


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run whose checkpoint was kept.

    Attributes:
        step: optimizer steps done.
        metric: the name of the metric that selects it, `ema_…` for that of the averaged weights.
        value: its value.
        metrics: all metrics of the evaluation.
        checkpoint: the checkpoint's folder.
    """

    step: int
    metric: str
    value: float
    metrics: dict[str, float]
    checkpoint: Path


class Run:
    """A run that `megavit.train` or the command line has made; it reads the run's folder when it is asked.

    It is a path too: `megavit.load(run)`, `megavit.evaluate(run)` and `init_from=run` take it as they take its folder.

    Args:
        path: the run's folder.

    Attributes:
        dir: the run's folder, absolute.

    Raises:
        ConfigError: if there is no run in the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.dir = Path(path).absolute()
        if not (self.dir / "config.yaml").is_file():
            raise ConfigError(f"{path} holds no run: there is no config.yaml in it; give the folder of a run, run.dir")

    @property
    def config(self) -> ExperimentConfig:
        """The configuration of the run, resolved."""
        return from_yaml((self.dir / "config.yaml").read_text())

    @property
    def metrics(self) -> "pd.DataFrame":
        """All lines of `metrics.jsonl`, sorted by step: columns `step`, `split` (`train`, `val` or `save`) and a column
        for each metric, NaN where a line has none. Steps that were trained again after a crash appear once.
        """
        import pandas as pd

        file = self.dir / "metrics.jsonl"
        rows = read_rows(file) if file.exists() else []
        once = [row for split in _SPLITS for row in without_repeated(rows, split)]
        frame = pd.DataFrame(once, columns=None if once else ["step", "split"])
        return frame.sort_values("step", kind="stable", ignore_index=True)

    @property
    def best(self) -> Best | None:
        """The best evaluation and its checkpoint; None where nothing was evaluated, or `checkpoint.best` is false."""
        from megavit.checkpoint.manager import CheckpointManager
        from megavit.checkpoint.state import read_state

        checkpoint = CheckpointManager(self.dir / "checkpoints").best()
        if checkpoint is None:
            return None
        state = read_state(checkpoint)
        name = self._task(num_classes=len(state.classes)).monitor.name_in(state.metrics)
        return Best(state.step, name, state.metrics[name], state.metrics, checkpoint)

    @property
    def step(self) -> int:
        """Optimizer steps done, by the last line of the metrics; 0 where there is none."""
        file = self.dir / "metrics.jsonl"
        steps = [row["step"] for row in read_rows(file)] if file.exists() else []
        return steps[-1] if steps else 0

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped, by Ctrl-C, a signal or `train.stop_at`, and has saved."""
        return self._exit_code == STOPPED

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step."""
        return self._exit_code == FINISHED

    def plot(self) -> "Figure":
        """Draw the loss and the task's metric over the steps.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            ConfigError: if nothing has been logged yet.
        """
        from megavit.metrics.plots import curves_figure

        file = self.dir / "metrics.jsonl"
        if not file.exists():
            raise ConfigError(
                f"{self.dir} has no metrics.jsonl yet; the first line comes after metrics.log_every steps"
            )
        figure = curves_figure(file, task_metrics=self._task(num_classes=0).reported)
        # Otherwise a notebook shows it only where pyplot has been imported.
        setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010
        return figure

    @property
    def _exit_code(self) -> int | None:
        file = self.dir / "exit.json"
        return json.loads(file.read_text())["code"] if file.exists() else None

    @property
    def _state(self) -> str:
        code = self._exit_code
        if code is None:
            return "under way"
        return {FINISHED: "finished", STOPPED: "stopped"}.get(code, f"failed with exit code {code}")

    def _task(self, *, num_classes: int) -> "Task":
        """Build the run's task, for its metrics' names, without code of the user's own."""
        from megavit.parallel.layout import ParallelLayout
        from megavit.task.registry import build_task

        config = self.config
        task = replace(config.task, implementation=None)
        if task.has_classes:
            num_classes = num_classes or len(getattr(task, "class_weights", None) or ()) or 1
        return build_task(
            task,
            model=config.model,
            data=config.data,
            num_classes=num_classes,
            layout=ParallelLayout.alone(),
            seed=config.run.seed,
        )

    def __fspath__(self) -> str:
        """Return the run's folder."""
        return str(self.dir)

    def __repr__(self) -> str:
        best = self.best
        found = f", best {best.metric} {best.value:.4f} at step {best.step}" if best is not None else ""
        return f"Run({str(self.dir)!r}: {self._state} at step {self.step}{found})"

    def _repr_html_(self) -> str:
        best = self.best
        rows = {"run": str(self.dir), "state": f"{self._state} at step {self.step}"}
        if best is not None:
            rows["best"] = f"{best.metric} {best.value:.4f} at step {best.step}"
        cells = (f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(cells)}</table>"


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()
