"""Write and verify `manifest.json` of a checkpoint: the size and sha256 of every file, so that no broken one is loaded.

Megatron-Core loads a shard with a flipped byte without an error (0.16.1).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FILE = "manifest.json"
# hashlib releases the GIL while it computes.
_THREADS = 8

# Entry of one file: {"size": bytes, "sha256": hexadecimal}.
Entry = dict[str, int | str]


@dataclass(frozen=True)
class Fault:
    """A fault of one file of a checkpoint."""

    file: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


def describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Return the size and sha256 of the named files of a folder."""
    paths = sorted(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = threads.map(lambda name: _entry(folder / name), paths)
        return dict(zip(paths, entries, strict=True))


def write_manifest(checkpoint: Path, files: dict[str, Entry]) -> None:
    """Write `manifest.json`, the last file of a checkpoint.

    Args:
        checkpoint: the folder.
        files: entry of every other file, by its path within the folder.
    """
    assert set(files) == set(_names(checkpoint)), "each file is described"
    content = {"sha256": _of_entries(files), "files": dict(sorted(files.items()))}
    (checkpoint / FILE).write_text(json.dumps(content, indent=1) + "\n")


def find_fault(checkpoint: Path) -> Fault | None:
    """Read every byte of a checkpoint; return the first fault by file name, None where there is none."""
    return next(find_faults(checkpoint), None)


def find_faults(checkpoint: Path) -> Iterator[Fault]:
    """Yield every fault of a checkpoint, sorted by file name."""
    # These two are written last by Megatron-Core and by megavit: without them the save was not completed.
    for name in ("metadata.json", "state.json"):
        if not (checkpoint / name).is_file():
            yield Fault(checkpoint / name, "is missing")
            return
    manifest = checkpoint / FILE
    if not manifest.is_file():
        yield Fault(manifest, "is missing")
        return
    try:
        content = json.loads(manifest.read_text())
        stated = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        if content["sha256"] != _of_entries(content["files"]):
            raise ValueError("its own sha256 does not match")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Fault(manifest, f"is broken: {error}")
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda item: _fault(checkpoint / item[0], *item[1]), sorted(stated.items()))
        yield from (fault for fault in found if fault is not None)
    for name in sorted(set(_names(checkpoint)) - set(stated)):
        yield Fault(checkpoint / name, "is not in the manifest")


def _fault(path: Path, size: int, sha256: str) -> Fault | None:
    try:
        there = path.stat().st_size
        if there != size:
            return Fault(path, f"has {there:,} bytes and should have {size:,}")
        if _sha256(path) != sha256:
            return Fault(path, "has changed since it was written (sha256)")
    except FileNotFoundError:
        return Fault(path, "is missing")
    except OSError as error:
        return Fault(path, f"cannot be read: {error.strerror}")
    return None


def _names(checkpoint: Path) -> Iterator[str]:
    for folder, _, files in os.walk(checkpoint):
        for name in files:
            path = str(Path(folder, name).relative_to(checkpoint))
            if path != FILE:
                yield path


def _entry(path: Path) -> Entry:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _of_entries(files: dict[str, Entry]) -> str:
    """Return the sha256 of the manifest's entries, so that a fault in the manifest is not reported for another file."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
