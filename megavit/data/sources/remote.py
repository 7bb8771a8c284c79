"""Read remote files by URL: http and object stores, through fsspec."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from megavit.errors import ConfigError

T = TypeVar("T")

_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}

# Seconds before a read is retried; object stores answer "slow down", and training lasts for days.
_PAUSES_S = (0.5, 2.0)

# Keys that identify a version of a file; the first that a store has is used.
_VERSIONS = ("ETag", "etag", "Content-MD5", "md5Hash", "LastModified", "Last-Modified", "updated", "mtime", "created")


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def bare(path: str) -> str:
    """Return a URL without its query, as in s.tar?signature=…; other paths unchanged."""
    return path.partition("?")[0] if is_url(path) else path


def can_list(url: str) -> bool:
    """Return whether the store can list files; web servers cannot."""
    return not url.startswith(("http://", "https://"))


def read(url: str) -> bytes:
    """Return a file's content.

    Raises:
        ConfigError: if it cannot be read.
    """
    system, path = _system(url)
    return _patiently(url, lambda: system.cat_file(path))


def read_range(url: str, offset: int, size: int) -> bytes:
    """Return part of a file.

    Raises:
        ConfigError: if it cannot be read, or the server returns another range.
    """
    system, path = _system(url)
    got = _patiently(url, lambda: system.cat_file(path, start=offset, end=offset + size))
    if len(got) != size:
        raise ConfigError(
            f"{url}: {size} bytes from {offset} on were requested, and {len(got)} received; the file is truncated, or "
            f"its server does not serve parts of files (HTTP ranges)"
        )
    return got


@contextmanager
def open_stream(url: str) -> Iterator[IO[bytes]]:
    """Open a file for sequential reading.

    Raises:
        ConfigError: if it cannot be opened.
    """
    system, path = _system(url)
    file = _patiently(url, lambda: system.open(path, "rb"))
    with file:
        try:
            file.seek(0, os.SEEK_END)
        except ValueError as error:
            raise ConfigError(
                f"{url}: its server does not serve parts of files (HTTP ranges); copy the file to one that does"
            ) from error
        file.seek(0)
        yield file


def version(url: str) -> list[int | str | None]:
    """Return a file's size in bytes and its version, None if the store has no versions.

    Raises:
        ConfigError: if it does not exist.
    """
    system, path = _system(url)
    about = _patiently(url, lambda: system.info(path))
    return [about.get("size"), next((str(about[name]) for name in _VERSIONS if about.get(name)), None)]


def exists(url: str) -> bool:
    """Return whether a file exists.

    Raises:
        ConfigError: if that cannot be determined.
    """
    system, path = _system(url)
    return bool(_patiently(url, lambda: system.exists(path)))


def names_within(url: str) -> list[str]:
    """Return the files in a folder of a store that can list, relative to it.

    Raises:
        ConfigError: if it cannot be listed.
    """
    system, path = _system(url)
    return [str(name)[len(path) :].lstrip("/") for name in _patiently(url, lambda: system.find(path))]


def _system(url: str) -> tuple[Any, str]:
    """Return the file system and its name for the file; not cached here, because fsspec caches one per process."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(url.partition("://")[0])
        way_out = f"pip install {package}" if package else "install it"
        raise ConfigError(
            f"{url} needs a package that is not installed ({error}); {way_out}, or copy the data here"
        ) from error
    except Exception as error:
        # Each store raises its own errors, for credentials, regions and names.
        raise ConfigError(f"{url} cannot be opened: {_describe(error)}") from error
    return system, path


def _patiently(url: str, ask: Callable[[], T]) -> T:
    for pause_s in (*_PAUSES_S, None):
        try:
            return ask()
        except Exception as error:
            # Any exception: each store's library raises its own types.
            if pause_s is None or isinstance(error, (FileNotFoundError, PermissionError, ImportError)):
                raise ConfigError(f"{url} cannot be read: {_describe(error)}") from error
            time.sleep(pause_s)
    raise AssertionError


def _describe(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return "it does not exist" if isinstance(error, FileNotFoundError) else f"{type(error).__name__} {first}".strip()
