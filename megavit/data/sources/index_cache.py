"""A listing of many samples, kept in a file beside the run and mapped into memory: listed once, read at every start."""

import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavit.errors import ConfigError

# A folder that changed this shortly before it was listed may change again and keep its time: file systems count in
# jiffies, some in whole seconds.
_UNSETTLED_NS = 2_000_000_000

# To be raised where the file's form or the order of what is listed changes.
_FORMAT = 1

_CRC_BYTES = len(b"00000000\n")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Index:
    """A listing.

    Attributes:
        about: what it lists and what it depends on, as JSON can hold it.
        arrays: columns of whole numbers or bytes; where they come from a file, its pages, shared by all processes.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]


def load_or_build(
    folder: Path | None, name: str, *, fits: Callable[[dict[str, Any]], bool], build: Callable[[], Index]
) -> Index:
    """Take a listing from its file, or make it and keep it there.

    A file that is broken, or written by half, is as one that is not there.

    Args:
        folder: of the files; None to make the listing and keep nothing.
        name: of the listing.
        fits: whether what a listing says about itself still holds.
        build: makes the listing.

    Raises:
        ConfigError: if the file cannot be written.
    """
    if folder is None:
        return build()
    file = folder / f"{name}.index"
    cached = _read(file)
    if cached is not None and fits(cached.about):
        return cached
    built = build()
    _write(file, built)
    return _read(file) or built


def settled(changed_ns: int) -> int | None:
    """The time of a change, by which a later one can be told; None where a later one could bear the same time."""
    return changed_ns if changed_ns < time.time_ns() - _UNSETTLED_NS else None


def _write(file: Path, index: Index) -> None:
    """A line with the checksum of the rest; a line of JSON; the arrays, each on a round address."""
    places, at = {}, 0
    for name, array in index.arrays.items():
        places[name] = [array.dtype.str, len(array), at]
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    message = json.dumps({"format": _FORMAT, "about": index.about, "arrays": places}).encode()
    message += b" " * (-(_CRC_BYTES + len(message) + 1) % _ALIGNMENT) + b"\n"
    parts: list[bytes | memoryview] = [message]
    for array in index.arrays.values():
        parts += [np.ascontiguousarray(array).view(np.uint8).data, bytes(-array.nbytes % _ALIGNMENT)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    # A name of its own: several ranks may write, where the folder is not shared or the data are too new to be kept.
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as to:
                to.writelines([b"%08x\n" % checksum, *parts])
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}; it keeps the list of the images. Make room, or choose "
            f"another run.dir"
        ) from error


def _read(file: Path) -> Index | None:
    try:
        content = np.asarray(np.memmap(file, np.uint8, mode="r"))
        if int(bytes(content[:_CRC_BYTES]), 16) != zlib.crc32(content[_CRC_BYTES:].data):
            return None
    except (OSError, ValueError):
        return None
    with file.open("rb") as lines:
        lines.readline()
        message = json.loads(lines.readline())
        start = lines.tell()
    if message["format"] != _FORMAT:
        return None
    arrays = {}
    for name, (dtype, length, at) in message["arrays"].items():
        first = start + at
        arrays[name] = content[first : first + length * np.dtype(dtype).itemsize].view(dtype)
    return Index(message["about"], arrays)
