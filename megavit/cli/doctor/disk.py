"""Check whether a run's folder can be written, and the free space there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megavit.cli.doctor.finding import Finding, State, gib
from megavit.errors import ConfigError

_LEAST_BYTES = 2**30
# NCCL and the loader's workers exchange data there; docker's default is 64 MiB.
_SHARED, _SHARED_BYTES = Path("/dev/shm"), 2**30


def check_disk(run_dir: Path) -> list[Finding]:
    """Write a file to the run's folder, and check the free space there and in shared memory."""
    return [_run_folder(run_dir), *_shared_memory()]


def _run_folder(run_dir: Path) -> Finding:
    place = run_dir.absolute()
    try:
        with kept_as_it_was(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(run_dir).free
            with tempfile.TemporaryFile(dir=run_dir) as file:
                file.write(b"megavit doctor")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        message = f"{place} cannot be written: {error.strerror or error}"
        return Finding(
            "disk", "run folder", State.broken, message, "run.dir=FOLDER chooses another", {"folder": str(place)}
        )
    figures = {"folder": str(place), "free_bytes": free}
    if free < _LEAST_BYTES:
        message = f"{place} has {gib(free)} free, less than the {gib(_LEAST_BYTES)} that a run needs"
        return Finding(
            "disk", "run folder", State.broken, message, "free space, or run.dir=FOLDER chooses another", figures
        )
    return Finding("disk", "run folder", State.ok, f"{place} can be written, {gib(free)} free", figures=figures)


@contextmanager
def kept_as_it_was(folder: Path) -> Iterator[None]:
    """Remove the folders that were created, if they are empty at the end."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def check_shared_folder(run_dir: Path, *, rank: int) -> Finding:
    """Check on several hosts that every rank writes to the same folder; every rank calls this."""
    from megavit.train.preflight import check_folder

    name = "shared run folder"
    try:
        with kept_as_it_was(run_dir) if rank == 0 else nullcontext():
            check_folder(run_dir, rank=rank)
    except ConfigError as error:
        return Finding("disk", name, State.broken, str(error))
    return Finding("disk", name, State.ok, "every rank writes to it and reads what rank 0 wrote")


def _shared_memory() -> list[Finding]:
    if not _SHARED.is_dir():
        return []
    free = shutil.disk_usage(_SHARED).free
    if free >= _SHARED_BYTES:
        return [Finding("disk", str(_SHARED), State.ok, f"{gib(free)} free", figures={"free_bytes": free})]
    message = f"{gib(free)} free: loader workers (data.workers) and NCCL may need more"
    advice = "docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    return [Finding("disk", str(_SHARED), State.missing, message, advice, {"free_bytes": free})]
