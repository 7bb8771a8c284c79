"""Write a command's output files: complete, or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megavit.errors import DISK_ERRORS, ConfigError


def check_writable(path: Path) -> None:
    """Refuse a file named by `out=` that cannot be written, before anything takes time. Its folder is made.

    Raises:
        ConfigError: saying why.
    """
    with _refused(f"out={path}"):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        temporary = _prepare(path)
        temporary.unlink()


def check_json(out: Path | None) -> None:
    """Refuse a file for results, `out=FILE.json`, that has another suffix or cannot be written; None passes.

    Raises:
        ConfigError: saying why.
    """
    if out is None:
        return
    if out.suffix != ".json":
        raise ConfigError(f"out={out} must end in .json")
    check_writable(out)


def write_json(out: Path, results: dict[str, Any]) -> None:
    """Write results as JSON.

    Raises:
        ConfigError: if the file cannot be written.
    """
    with complete_file(out) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


def make_folder(folder: Path) -> None:
    """Make the folder of `out=`, before anything takes time.

    Raises:
        ConfigError: if it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"out: {folder} is a file; give a folder, there or to be made") from error
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be made: {error.strerror}") from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to, which takes the name of a file at the end.

    After an error in between nothing is left of it, and a file that was there before is as it was. Its mode is that of
    any file that the user makes. The body only writes: an OSError in it is told of this file.

    Args:
        path: the file.

    Raises:
        ConfigError: if it cannot be written.
    """
    with _refused(str(path)):
        temporary = _prepare(path)
        mode = temporary.stat().st_mode
        try:
            yield temporary
            # A library may have put another file in place.
            temporary.chmod(mode)
            temporary.replace(os.path.realpath(path))
        finally:
            temporary.unlink(missing_ok=True)


def _prepare(path: Path) -> Path:
    """An empty file in the folder of another one, with its suffix: libraries go by that."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    temporary.touch()
    return temporary


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        way_out = "make room there, or choose another place" if error.errno in DISK_ERRORS else "choose another place"
        raise ConfigError(f"{what} cannot be written: {error.strerror or error}; {way_out}") from error
