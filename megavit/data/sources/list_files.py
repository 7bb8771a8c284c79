"""List the images in a folder, and define their order."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megavit.errors import ConfigError, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".npy")

_NUMBER = re.compile(r"\d+")

# Number of folders to read at once: on a network file system each read is a round trip.
_THREADS = 16


@dataclass(frozen=True)
class DirListing:
    """One listed folder.

    Attributes:
        path: relative to the root; empty for the root.
        changed_ns: modification time, read before the entries.
        images: names of the images in it.
    """

    path: str
    changed_ns: int
    images: list[str]


def list_images(root: Path, *, start: Sequence[str] = ("",)) -> Iterator[DirListing]:
    """List folders and their subfolders, without hidden ones, in no particular order.

    Links are followed, except those to a folder that contains them.

    Args:
        root: the top folder.
        start: folders in it to list; by default the root.

    Raises:
        ConfigError: if a folder cannot be read.
    """
    due: list[tuple[str, frozenset[str]]] = [(path, frozenset()) for path in start]
    with ThreadPoolExecutor(_THREADS) as pool:
        while due:
            found = pool.map(lambda job: _list_folder(root, *job), due)
            due = []
            for walked, within in found:
                due += within
                if walked is not None:
                    yield walked


def _list_folder(
    root: Path, path: str, above: frozenset[str]
) -> tuple[DirListing | None, list[tuple[str, frozenset[str]]]]:
    """List one folder; return it, and its subfolders with the resolved paths of their parents."""
    folder = os.path.join(root, path)
    images, within = [], []
    try:
        true = os.path.realpath(folder)
        if true in above:
            return None, []
        changed_ns = os.stat(folder).st_mtime_ns
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    within.append((os.path.join(path, name), above | {true}))
                elif name.lower().endswith(SUFFIXES):
                    images.append(name)
    except OSError as error:
        raise ConfigError(f"{printable(folder)} cannot be read: {error.strerror}") from error
    return DirListing(path, changed_ns, images), within


def places_in_order(paths: Sequence[str]) -> list[int]:
    """Return the indices that sort paths by file name, with numbers as numbers, then by folder.

    Numbered files that were exported from a table are in the table's order, whatever their folders, so that files and
    table give the same run.
    """
    keys = [_key(path) for path in paths]
    return sorted(range(len(keys)), key=keys.__getitem__)


def in_order(paths: Iterable[str]) -> list[str]:
    """Return paths sorted by `places_in_order`."""
    paths = list(paths)
    return [paths[place] for place in places_in_order(paths)]


def _key(path: str) -> str:
    """Return text that sorts like a name's list of texts and numbers: 1.3 million names take 3.7 s instead of 9.5 s.

    A number becomes NUL, the count of its digits and its digits; the name ends with two NULs. No file name contains a
    NUL, so a name sorts before its extensions.
    """
    return _NUMBER.sub(_sortable, path.rpartition("/")[2]) + "\0\0" + path


def _sortable(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    if not digits.isascii():
        digits = str(int(digits))
    return f"\0{chr(len(digits) + 1)}{digits}"
