"""Verify a run's checkpoints, or remove older ones (`megavit verify`, `megavit prune`)."""

from dataclasses import dataclass
from pathlib import Path

from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.manifest import FILE, find_faults
from megavit.cli.arguments import argument
from megavit.errors import ConfigError
from megavit.runtime.run_dir import FINDINGS, FINISHED, lock_folder


@dataclass(frozen=True)
class VerifyArgs:
    """The arguments of `megavit verify`.

    Attributes:
        from_: a run's folder, or one of its checkpoints.
    """

    from_: Path = argument(form="PATH")


@dataclass(frozen=True)
class PruneArgs:
    """The arguments of `megavit prune`.

    Attributes:
        from_: a run's folder.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this.
    """

    from_: Path = argument(form="RUN")
    keep_last: int = argument(form="N")
    keep_every: int | None = argument(None, form="STEPS")


def verify(args: VerifyArgs) -> int:
    """Read every byte of a run's checkpoints, or of one checkpoint, and print the faults.

    Returns:
        The exit code: 3 if a checkpoint is broken, else 0.

    Raises:
        ConfigError: if there is no checkpoint.
    """
    path = args.from_
    checkpoints = CheckpointManager(path / "checkpoints").all() if (path / "checkpoints").is_dir() else [path]
    if not checkpoints or not any((checkpoints[0] / name).is_file() for name in ("metadata.json", "state.json", FILE)):
        raise ConfigError(f"from={path} holds no checkpoint; give a run's folder or one of its checkpoints/step_…")
    broken = 0
    for checkpoint in checkpoints:
        faults = list(find_faults(checkpoint))
        broken += bool(faults)
        for fault in faults:
            print(f"{checkpoint}: broken, {fault}")
        if not faults:
            files = [file for file in checkpoint.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            print(f"{checkpoint}: valid, {len(files)} files of {size:,} bytes")
    return FINDINGS if broken else FINISHED


def prune(args: PruneArgs) -> int:
    """Remove a run's older checkpoints; the newest valid one and the best one always stay.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if no checkpoint is valid, or the run is in progress.
    """
    run_dir = args.from_
    if not (run_dir / "checkpoints").is_dir():
        raise ConfigError(f"from={run_dir} is not a run's folder: it has no checkpoints/")
    store = CheckpointManager(run_dir / "checkpoints")
    with lock_folder(run_dir):
        newest, warnings = store.latest_valid()
        if newest is None:
            message = f": {'; '.join(warnings)}" if warnings else ""
            raise ConfigError(f"from={run_dir} holds no valid checkpoint{message}; nothing is removed")
        gone = store.prune(keep_last=args.keep_last, keep_every=args.keep_every, spare=newest)
    for path in gone:
        print(f"removed {path}")
    print(f"{len(gone)} removed, {len(store.all())} stay; the newest valid one is {newest.name}")
    return FINISHED
