"""A checkpoint by whatever a user names: a run, the checkpoint itself, or the pointer to one."""

import sys
from pathlib import Path

from megavit.checkpoint.manifest import find_fault
from megavit.checkpoint.store import CheckpointStore
from megavit.errors import ConfigError


def find_checkpoint(path: Path, *, setting: str = "from") -> Path:
    """The newest checkpoint of a run's folder, or the checkpoint itself, or the one that `latest` or `best` names.

    Args:
        path: one of those.
        setting: that named it, for the error.

    Raises:
        ConfigError: if there is none, or it is broken.
    """
    if path.is_file() and path.name in ("latest", "best"):
        path = path.parent / path.read_text().strip()
    found: Path | None = path
    if (path / "checkpoints").is_dir():
        found, warnings = CheckpointStore(path / "checkpoints").newest_whole()
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
