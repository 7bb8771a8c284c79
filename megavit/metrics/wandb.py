"""Report a run to Weights & Biases; the run's folder stores its id, so that a resumed run continues the same curves."""

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from megavit.errors import ConfigError, printable
from megavit.validation import format_value

_START_S = 60


def _sendable(value: Any) -> Any:
    """Return a setting's value in a form that can be sent: bytes of a path that are not UTF-8 are escaped."""
    return printable(value) if isinstance(value, str) else format_value(value)


class WandbRun:
    """One run of Weights & Biases.

    Args:
        project: name of the project.
        name: name of the run.
        run_dir: the run's folder, with the id in `wandb_id` and Weights & Biases' files in `wandb/`.
        settings: the resolved configuration.

    Raises:
        ConfigError: if the package is missing or the service refuses the run.
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
        # Lines printed by wandb would interrupt the progress bar.
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
                f"metrics.wandb={project}: Weights & Biases refuses the run: {error}. Set a key with `wandb login`, or "
                f"WANDB_MODE=offline to write local files only, or metrics.wandb=null"
            ) from error
        id_file.write_text(run_id + "\n")
        # Plot against the optimizer's steps, of which a resumed run may log some again.
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
        """Send the remaining data and end the run."""
        self._run.finish()
