"""Files that lie elsewhere, by URL: http and object stores, through fsspec."""

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

# Seconds before a read is tried again; object stores answer "slow down", and a training lasts for days.
_PAUSES_S = (0.5, 2.0)

# How stores tell one version of a file from the next; the first that is there.
_VERSIONS = ("ETag", "etag", "Content-MD5", "md5Hash", "LastModified", "Last-Modified", "updated", "mtime", "created")


def is_url(path: str) -> bool:
    """Whether a path is a URL, and so not of this machine's file system."""
    return "://" in path


def bare(path: str) -> str:
    """A URL without what it asks of the server, as in s.tar?signature=…; any other path as it is."""
    return path.partition("?")[0] if is_url(path) else path


def can_list(url: str) -> bool:
    """Whether the store can tell which files it has; web servers cannot."""
    return not url.startswith(("http://", "https://"))


def read(url: str) -> bytes:
    """A file's content.

    Raises:
        ConfigError: if it cannot be read.
    """
    system, path = _system(url)
    return _patiently(url, lambda: system.cat_file(path))


def read_range(url: str, offset: int, size: int) -> bytes:
    """Part of a file.

    Raises:
        ConfigError: if it cannot be read, or the server gives other than was asked for.
    """
    system, path = _system(url)
    got = _patiently(url, lambda: system.cat_file(path, start=offset, end=offset + size))
    if len(got) != size:
        raise ConfigError(
            f"{url}: {size} bytes from {offset} on were asked for, and {len(got)} came; the file was cut, or its "
            f"server does not serve parts of files (HTTP ranges)"
        )
    return got


@contextmanager
def open_stream(url: str) -> Iterator[IO[bytes]]:
    """A file to be read from front to back.

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
    """A file's size in bytes and what tells this content from a later one, None where the store tells nothing.

    Raises:
        ConfigError: if it is not there.
    """
    system, path = _system(url)
    about = _patiently(url, lambda: system.info(path))
    return [about.get("size"), next((str(about[name]) for name in _VERSIONS if about.get(name)), None)]


def exists(url: str) -> bool:
    """Whether there is such a file.

    Raises:
        ConfigError: if that cannot be told.
    """
    system, path = _system(url)
    return bool(_patiently(url, lambda: system.exists(path)))


def names_within(url: str) -> list[str]:
    """The files under a folder of a store that can list, relative to it.

    Raises:
        ConfigError: if it cannot be listed.
    """
    system, path = _system(url)
    return [str(name)[len(path) :].lstrip("/") for name in _patiently(url, lambda: system.find(path))]


def _system(url: str) -> tuple[Any, str]:
    """The store and its own name for the file; asked anew each time, because fsspec keeps one per process."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(url.partition("://")[0])
        way_out = f"pip install {package}" if package else "install what it names"
        raise ConfigError(
            f"{url} needs a package that is not here ({error}); {way_out}, or copy the data here"
        ) from error
    except Exception as error:
        # Each store has errors of its own: of credentials, regions, names.
        raise ConfigError(f"{url} cannot be opened: {_describe(error)}") from error
    return system, path


def _patiently(url: str, ask: Callable[[], T]) -> T:
    for pause_s in (*_PAUSES_S, None):
        try:
            return ask()
        except Exception as error:
            # Of any type: each store's library raises its own.
            if pause_s is None or isinstance(error, (FileNotFoundError, PermissionError, ImportError)):
                raise ConfigError(f"{url} cannot be read: {_describe(error)}") from error
            time.sleep(pause_s)
    raise AssertionError


def _describe(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return "it is not there" if isinstance(error, FileNotFoundError) else f"{type(error).__name__} {first}".strip()
