"""Cache a list of many samples in a file, memory-mapped: built once, read at every later start."""

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

# A folder that changed this shortly before it was listed may change again without a new timestamp: file systems count
# in jiffies, some in seconds.
_UNSETTLED_NS = 2_000_000_000

# Increase when the file's format or the order of the samples changes.
_FORMAT = 1

_CRC_BYTES = len(b"00000000\n")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Index:
    """A list of samples.

    Attributes:
        about: what is listed and what it depends on, as JSON.
        arrays: columns of integers or bytes; memory-mapped if read from a file.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]


def load_or_build(
    folder: Path | None, name: str, *, fits: Callable[[dict[str, Any]], bool], build: Callable[[], Index]
) -> Index:
    """Read a list from its file, or build it and write the file.

    A broken or incomplete file is treated as missing.

    Args:
        folder: folder of the files; None to build without caching.
        name: name of the list.
        fits: function that returns whether `about` of a cached list is still valid.
        build: function that builds the list.

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
    """Return the time of a change; None if a later change could have the same time."""
    return changed_ns if changed_ns < time.time_ns() - _UNSETTLED_NS else None


def _write(file: Path, index: Index) -> None:
    """Write a line with the checksum of the rest, a line of JSON, and the arrays at aligned offsets."""
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
    # A unique name: several ranks may write, if the folder is not shared or the data changed too recently to be cached.
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
            f"{file} cannot be written: {error.strerror}; it caches the list of the images. Make room, or choose "
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
