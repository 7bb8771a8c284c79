"""`megavit verify` and `megavit prune`: checkpoints looked through, and thinned out."""

from pathlib import Path

from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.manifest import FILE, find_faults
from megavit.cli.arguments import parse_arguments
from megavit.errors import ConfigError
from megavit.runtime.run_dir import FINISHED, USER_ERROR, lock_folder
from megavit.validation import parse_int


def verify(arguments: list[str]) -> int:
    """Read every byte of a run's checkpoints, or of one, and say what is wrong.

    Args:
        arguments: `from=PATH`, a run's folder or a checkpoint.

    Returns:
        The exit code: 2 if one of them is broken.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(parse_arguments("verify", arguments, needed=("from",), optional=())["from"])
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
            print(f"{checkpoint}: whole, {len(files)} files of {size:,} bytes")
    return USER_ERROR if broken else FINISHED


def prune(arguments: list[str]) -> int:
    """Remove a run's older checkpoints; the newest whole one and the best one always stay.

    Args:
        arguments: `from=RUN keep_last=N`, and optionally `keep_every=STEPS`.

    Raises:
        ConfigError: if no checkpoint is whole, or the run is under way.
    """
    args = parse_arguments("prune", arguments, needed=("from", "keep_last"), optional=("keep_every",))
    run_dir = Path(args["from"])
    if not (run_dir / "checkpoints").is_dir():
        raise ConfigError(f"from={run_dir} is no run's folder: it has no checkpoints/")
    keep_every = parse_int("keep_every", args["keep_every"]) if "keep_every" in args else None
    store = CheckpointManager(run_dir / "checkpoints")
    with lock_folder(run_dir):
        newest, warnings = store.latest_valid()
        if newest is None:
            message = f": {'; '.join(warnings)}" if warnings else ""
            raise ConfigError(f"from={run_dir} holds no whole checkpoint{message}; nothing is removed")
        keep_last = parse_int("keep_last", args["keep_last"])
        gone = store.prune(keep_last=keep_last, keep_every=keep_every, spare=newest)
    for path in gone:
        print(f"removed {path}")
    print(f"{len(gone)} removed, {len(store.all())} stay; the newest whole one is {newest.name}")
    return FINISHED
