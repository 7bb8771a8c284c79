"""Find a checkpoint from what a user types: a run, a checkpoint, or the file `latest` or `best`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.manifest import find_fault
from megavit.errors import ConfigError

# Prefix that selects the moving average of the weights.
_AVERAGE = "ema:"


@dataclass(frozen=True)
class CheckpointRef:
    """A reference to the weights of a checkpoint.

    Attributes:
        checkpoint: folder of the checkpoint.
        averaged: whether to take the moving average instead of the weights.
    """

    checkpoint: Path
    averaged: bool = False

    def __str__(self) -> str:
        return f"the moving average of {self.checkpoint}" if self.averaged else str(self.checkpoint)


def resolve_checkpoint(place: str, *, setting: str = "from") -> CheckpointRef:
    """Return the newest weights of a run, or those of a checkpoint; with the prefix `ema:` their moving average.

    Args:
        place: a path that `find_checkpoint` accepts, with an optional prefix `ema:`.
        setting: name of the setting that holds `place`, for the error.

    Raises:
        ConfigError: if there is no checkpoint, or it is broken.
    """
    path = Path(place.removeprefix(_AVERAGE))
    return CheckpointRef(find_checkpoint(path, setting=setting), averaged=place.startswith(_AVERAGE))


def find_checkpoint(path: Path, *, setting: str = "from") -> Path:
    """Return the newest checkpoint of a run's folder, the checkpoint itself, or the one that `latest` or `best` names.

    Args:
        path: a run's folder, a checkpoint's folder, or the file `latest` or `best`.
        setting: name of the setting that holds `path`, for the error.

    Raises:
        ConfigError: if there is no checkpoint, or it is broken.
    """
    if path.is_file() and path.name in ("latest", "best"):
        path = path.parent / path.read_text().strip()
    found: Path | None = path
    if (path / "checkpoints").is_dir():
        found, warnings = CheckpointManager(path / "checkpoints").latest_valid()
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    fault = find_fault(found) if found is not None else None
    if fault is not None and fault.file.name != "metadata.json":
        raise ConfigError(f"{setting}={path} is broken: {fault}; choose another checkpoint")
    if found is None or fault is not None:
        raise ConfigError(
            f"{setting}={path} holds no checkpoint; give a run's folder, its checkpoints/best or one of its "
            f"checkpoints/step_… folders"
        )
    return found
