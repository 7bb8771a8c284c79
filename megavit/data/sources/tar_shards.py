"""Find local or remote tar shards, assign them to splits, and read bytes from them."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megavit.data.sources import remote
from megavit.data.sources.index_cache import settled
from megavit.data.sources.list_files import in_order
from megavit.data.sources.train_val_split import find_splits, parts_by_name
from megavit.errors import ConfigError

# Shards that are queried or read at once.
_THREADS = 16

# Number of local shards that a process keeps open; others are opened for each image. Systems usually allow 1,024 files.
_MAX_OPEN = 256

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        path: path of a file, or a URL.
        size: size in bytes.
        version: value that identifies the content, such as its modification time; None if nothing does.
    """

    path: str
    size: int
    version: int | str | None


def find_shards(path: str) -> dict[str, list[str]]:
    """Return the tars of `train` and `val`, or of `all` if there is one set.

    Args:
        path: a tar; a text file with a tar per line; or a folder, with or without train/ and val/. Each may be a URL.

    Raises:
        ConfigError: if there is no tar, or one is compressed.
    """
    if remote.bare(path).endswith((".tar", *_COMPRESSED)):
        return {"all": _uncompressed([path])}
    if remote.bare(path).endswith(".txt"):
        names = _uncompressed(_listed(path))
        return parts_by_name(names) or {"all": names}
    found, splits = _within(path)
    names = in_order(_uncompressed(found))
    if not names:
        raise ConfigError(f"data.path={path}, its train/ and its val/ have no shard, a file that ends in .tar")
    halves = {half: [name for name in names if name.startswith(f"{folder}/")] for half, folder in splits.items()}
    loose = [name for name in names if "/" not in name]
    if any(halves.values()):
        lacking = next((splits[half] for half, some in halves.items() if not some), None)
        if lacking or loose:
            has = (
                f"no shard in {lacking}/" if lacking else f"{loose[0]} outside {splits['train']}/ and {splits['val']}/"
            )
            raise ConfigError(f"data.path={path} has {has}; put all of its shards into train/ and val/, or none")
        parts = halves
    else:
        parts = parts_by_name(loose) or {"all": loose}
    return {part: [f"{path.rstrip('/')}/{name}" for name in some] for part, some in parts.items()}


def beside(path: str, name: str) -> str:
    """Return the path of a file next to the shards: in their folder, or in that of the tar or the list."""
    bare = remote.bare(path)
    return os.path.join(bare.rpartition("/")[0] if bare.endswith((".tar", ".txt")) else bare, name)


def look_at(paths: Sequence[str]) -> list[Shard]:
    """Return the shards with their current sizes and versions.

    Raises:
        ConfigError: if one does not exist.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_look_at_one, paths))


@contextmanager
def open_shard(path: str) -> Iterator[IO[bytes]]:
    """Open a shard for sequential reading.

    Raises:
        ConfigError: if it cannot be opened.
    """
    if remote.is_url(path):
        with remote.open_stream(path) as file:
            yield file
        return
    try:
        file = Path(path).open("rb")  # noqa: SIM115
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


class ShardReader:
    """Read bytes from shards, at any offset and in any process.

    Files are opened at the first read. Forked processes share the open files: each read passes its offset, so that no
    position is shared. A pickled copy opens its own files.

    Args:
        shards: by number.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self._files: dict[int, IO[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "_files": {}}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return part of a shard.

        Raises:
            ConfigError: if it cannot be read, or has changed since it was listed.
        """
        path = self.shards[number].path
        if remote.is_url(path):
            return remote.read_range(path, offset, size)
        try:
            file = self._files.get(number) or self._open(number)
            content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise _unreadable(path, error) from error
        if len(content) < size:
            raise ConfigError(f"{path} ends before byte {offset + size:,}, where an image ends; {_CHANGED}")
        return content

    def _open(self, number: int) -> IO[bytes]:
        shard = self.shards[number]
        file = Path(shard.path).open("rb", buffering=0)  # noqa: SIM115
        about = os.fstat(file.fileno())
        if about.st_size != shard.size or shard.version not in (None, about.st_mtime_ns):
            raise ConfigError(f"{shard.path} is another file than was listed; {_CHANGED}")
        if len(self._files) < _MAX_OPEN:
            # If two threads open it, the first one's file is kept.
            return self._files.setdefault(number, file)
        return file


_CHANGED = "it has changed since the run started, start it again"


def _look_at_one(path: str) -> Shard:
    if remote.is_url(path):
        size, version = remote.version(path)
        if not isinstance(size, int):
            raise ConfigError(f"{path}: its server does not report its size; copy the file to one that does")
        return Shard(path, size, version)
    try:
        about = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return Shard(path, about.st_size, settled(about.st_mtime_ns))


def _listed(path: str) -> list[str]:
    """Return the tars that a text file lists, relative to its folder."""
    try:
        content = remote.read(path) if remote.is_url(path) else Path(path).read_bytes()
        lines = [line.strip() for line in content.decode().splitlines()]
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as text in UTF-8: {error}") from error
    names = [line if remote.is_url(line) else beside(path, line) for line in lines if line]
    for line, name in zip(filter(None, lines), names, strict=True):
        if not remote.bare(name).endswith((".tar", *_COMPRESSED)):
            raise ConfigError(f"{path} names {line}, which does not end in .tar; list one shard per line")
        if remote.is_url(path) and line.startswith("/"):
            raise ConfigError(
                f"{path} names {line}, a path on one machine; in a remote list use URLs, or paths relative to it"
            )
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        raise ConfigError(f"{path} names {f'{twice} twice' if twice else 'no shard'}; list one per line, each once")
    return names


def _within(path: str) -> tuple[list[str], dict[str, str]]:
    """Return the visible tars in a folder and its split folders, relative to it; and the split folders."""
    splits = {"train": "train", "val": "val"}
    if not remote.is_url(path):
        if not os.path.isdir(path):
            raise ConfigError(
                f"data.path={path} does not exist; data=tar takes a folder of .tar files, one .tar file, or a .txt "
                f"file with one shard per line"
            )
        try:
            found = os.listdir(path)
            folders = [name for name in found if os.path.isdir(os.path.join(path, name))]
            splits = find_splits(folders) or splits
            for folder in splits.values():
                if folder in folders:
                    found += [os.path.join(folder, name) for name in os.listdir(os.path.join(path, folder))]
        except OSError as error:
            raise _unreadable(path, error) from error
    elif remote.can_list(path):
        found = remote.names_within(path)
        splits = find_splits(name.partition("/")[0] for name in found if "/" in name) or splits
    else:
        raise ConfigError(
            f"data.path={path}: a web server cannot list its files; name one .tar, or a .txt file with one shard per "
            f"line"
        )
    tars = [
        name
        for name in found
        if name.endswith((".tar", *_COMPRESSED))
        and name.rpartition("/")[0] in ("", *splits.values())
        and not name.rpartition("/")[2].startswith(".")
    ]
    return tars, splits


def _uncompressed(names: list[str]) -> list[str]:
    for name in names:
        if remote.bare(name).endswith(_COMPRESSED):
            raise ConfigError(
                f"{name} is compressed, and images are read from any position of a shard; unpack it to .tar once "
                f"(compression hardly makes images smaller)"
            )
    return names


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {error.strerror}")
