"""Weights & Biases, when asked for: the run keeps its id in its folder and goes on in the same curves."""

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from megavit.errors import ConfigError, printable
from megavit.validation import format_value

_START_S = 60


def _sendable(value: Any) -> Any:
    """A setting's value; a path that is no UTF-8 as it can be printed, for it could not be sent."""
    return printable(value) if isinstance(value, str) else format_value(value)


class WandbRun:
    """One run of Weights & Biases.

    Args:
        project: its project.
        name: of the run.
        run_dir: the run's folder; `wandb_id` there holds the id, `wandb/` its files.
        settings: the resolved configuration.

    Raises:
        ConfigError: if the package is missing or the service refuses.
    """

    def __init__(self, project: str, *, name: str, run_dir: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"metrics.wandb={project} needs the package wandb: pip install wandb, or set metrics.wandb=null"
            ) from error
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        # Its own lines would break into the progress bar; where its files are is in the folder.
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=run_dir,
                config={key: _sendable(value) for key, value in settings.items()},
                # Signals stop the run between two steps; wandb must not take them.
                settings=wandb.Settings(init_timeout=_START_S, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"metrics.wandb={project}: Weights & Biases refuses: {error}. `wandb login` gives it a key; "
                f"WANDB_MODE=offline keeps everything here; metrics.wandb=null leaves it away"
            ) from error
        id_file.write_text(run_id + "\n")
        # Against the optimizer's steps, also where a resumed run logs some of them again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Send one line of metrics."""
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def log_images(self, step: int, split: str, picture: np.ndarray) -> None:
        """Send a picture, uint8 [row, column, RGB]."""
        self._run.log({"step": step, f"{split}/pictures": self._image(picture)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
