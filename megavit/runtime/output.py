"""Write a command's output files: a file is complete or absent."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megavit.errors import DISK_ERRORS, ConfigError


def check_writable(path: Path) -> None:
    """Check that the file of `out=` can be written, before the command computes anything; create its folder.

    Raises:
        ConfigError: if it cannot be written, with the reason.
    """
    with _refused(f"out={path}"):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        temporary = _prepare(path)
        temporary.unlink()


def check_json(out: Path | None) -> None:
    """Check that a file for results, `out=FILE.json`, ends in .json and can be written; accept None.

    Raises:
        ConfigError: if not, with the reason.
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
    """Create the folder of `out=`, before the command computes anything.

    Raises:
        ConfigError: if it cannot be created or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"out: {folder} is a file; give a folder, existing or new") from error
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be created: {error.strerror}") from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to, and rename it to `path` at the end.

    After an error the temporary file is deleted and an older file at `path` is unchanged. The file's mode follows the
    user's umask. The body should only write: an OSError in it is reported as an error of this file.

    Args:
        path: the file to write.

    Raises:
        ConfigError: if it cannot be written.
    """
    with _refused(str(path)):
        temporary = _prepare(path)
        mode = temporary.stat().st_mode
        try:
            yield temporary
            # A library may have replaced the temporary file by one with another mode.
            temporary.chmod(mode)
            temporary.replace(os.path.realpath(path))
        finally:
            temporary.unlink(missing_ok=True)


def _prepare(path: Path) -> Path:
    """Create an empty temporary file next to `path`, with its suffix, by which libraries choose the format."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    temporary.touch()
    return temporary


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        way_out = "free space there, or choose another place" if error.errno in DISK_ERRORS else "choose another place"
        raise ConfigError(f"{what} cannot be written: {error.strerror or error}; {way_out}") from error
