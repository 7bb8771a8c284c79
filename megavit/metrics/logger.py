"""Log a run's metrics, on rank 0, to the console, `metrics.jsonl`, TensorBoard and Weights & Biases."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor

from megavit.metrics.config import MetricsConfig
from megavit.metrics.notebook import NotebookProgress
from megavit.metrics.plots import plot_image_grid
from megavit.metrics.task_metric import TaskMetric, console_formats
from megavit.metrics.wandb import WandbRun

# Console formats of metrics that every task has.
_TRAINING_FORMATS = {
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.3f}",
    "images_per_s": "{:,.0f} images/s",
    "mfu": "mfu {:.1%}",
    "waited_s": "the training waited {:.1f} s",
}

_CALLED = {"train": "", "val": "validation  ", "save": "saved  "}


class _Clock:
    """Estimate the remaining time, evaluations and saves included.

    Args:
        first_step: steps done before the start.
        num_steps: steps of the full run.
    """

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._counted_from, self._since, self._num_steps = first_step, time.monotonic(), num_steps
        self._is_first = True

    def left_at(self, step: int) -> str:
        """Return the remaining time after a step, as hours:minutes:seconds.

        The first step, which compiles kernels and fills caches, counts only until the second is done.
        """
        now = time.monotonic()
        pace_s = (now - self._since) / max(1, step - self._counted_from)
        if self._is_first:
            self._counted_from, self._since, self._is_first = step, now, False
        minutes, seconds = divmod(round(pace_s * (self._num_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"


class MetricLogger:
    """Write one run's metrics to the console and to files; it does nothing on ranks other than 0.

    Args:
        config: the metrics group.
        run_dir: the run's folder.
        is_main: whether this rank logs.
        name: name of the run.
        settings: the resolved configuration, for Weights & Biases.
        task_metrics: metrics of the task that the console shows after the loss.
        first_step: steps done before this process.
        num_steps: steps of the full run.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: Path,
        *,
        is_main: bool,
        name: str,
        settings: dict[str, Any],
        task_metrics: tuple[TaskMetric, ...],
        first_step: int,
        num_steps: int,
    ) -> None:
        self._speaks, self._run_dir = is_main, run_dir
        self._formats = {"loss": "loss {:.4f}", **console_formats(task_metrics), **_TRAINING_FORMATS}
        self._progress: Progress | NotebookProgress | None = None
        self._task: TaskID | None = None
        self._clock = _Clock(first_step, num_steps)
        self._tensorboard: Any = None
        self._wandb: WandbRun | None = None
        self._lines: TextIO | None = None
        self._log: TextIO | None = None
        if not is_main:
            return
        in_notebook = Console().is_jupyter
        # In a notebook rich would make a block of HTML of each line.
        self.console = Console(soft_wrap=True, highlight=False, force_jupyter=False)
        self._lines = _append_to(run_dir / "metrics.jsonl")
        self._log = (run_dir / "train.log").open("a", errors="backslashreplace")
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Later steps that a crashed run wrote are purged, because this run writes them again.
            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        if config.wandb is not None:
            self._wandb = WandbRun(config.wandb, name=name, run_dir=run_dir, settings=settings)
        if in_notebook:
            self._progress, self._task = NotebookProgress(completed=first_step, total=num_steps), TaskID(0)
        elif self.console.is_terminal:
            bar = Progress(
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self._progress = bar
            self._task = bar.add_task("", completed=first_step, total=num_steps, left="")

    def __enter__(self) -> "MetricLogger":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        for file in (self._tensorboard, self._wandb, self._lines, self._log):
            if file is not None:
                file.close()

    def info(self, text: str) -> None:
        """Print a line and append it to `train.log`."""
        if not self._speaks:
            return
        assert self._log is not None
        self._log.write(text + "\n")
        self._log.flush()
        self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Advance the progress bar.

        Args:
            step: optimizer steps done.
        """
        if self._progress is not None:
            assert self._task is not None
            self._progress.update(self._task, completed=step, left=self._clock.left_at(step))

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Write one line of metrics.

        Args:
            step: optimizer steps done.
            split: `train`, `val` or `save`.
            values: values by name; the console shows those that have a format.
        """
        if not self._speaks:
            return
        assert self._lines is not None
        # JSON has no NaN: a loss that is not finite becomes null, so that every reader can read the file.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        self._lines.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(step, split, values)
        line = "  ".join(form.format(values[name]) for name, form in self._formats.items() if name in values)
        if split == "train" and self._progress is not None:
            assert self._task is not None and self._log is not None
            self._progress.update(self._task, description=line)
            self._log.write(f"step {step}  {line}\n")
        else:
            self.info(f"step {step}  {_CALLED[split]}{line}")

    def log_images(self, step: int, split: str, image_grid: Tensor, *, titles: tuple[str, ...]) -> None:
        """Write a picture into `pictures/` and TensorBoard.

        Args:
            step: optimizer steps done.
            split: `train` or `val`.
            image_grid: uint8 [image, panel, channel, row, column].
            titles: titles of the panels.
        """
        if not self._speaks:
            return
        path = self._run_dir / "pictures" / f"{split}_{step:08d}.png"
        picture = plot_image_grid(image_grid, titles=titles, path=path)
        if self._tensorboard is not None:
            self._tensorboard.add_image(f"{split}/pictures", picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log_images(step, split, picture)
        self.info(f"step {step}  picture {path}")


def _append_to(path: Path) -> TextIO:
    """Open a file of lines to append to, and end a line that a full disk or a killed run left incomplete."""
    with path.open("ab+") as written:
        size = written.tell()
        written.seek(max(0, size - 1))
        torn = size > 0 and written.read() != b"\n"
    file = path.open("a")
    if torn:
        file.write("\n")
    return file
