"""Define the errors that a user sees, and make text printable for their messages."""

import errno
import io
import os
import sys

# Error numbers of a full disk, an exhausted quota and a disk that became read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ConfigError(ValueError):
    """An error of the user's settings or data; megavit prints its message without a traceback and returns exit code 2.

    The message names the setting by its path, shows the value and the arithmetic that failed, and says what to set
    instead. A fault of megavit itself is an `assert` or any other exception: megavit prints the traceback and returns
    exit code 1.
    """


class RunError(RuntimeError):
    """A command that a Python call has started in other processes failed.

    Attributes:
        code: its exit code (see `megavit.runtime.run_dir`).
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


def disk_full(error: OSError) -> str:
    """Return the message for one of `DISK_ERRORS` in a run."""
    file = f" {error.filename}" if error.filename else ""
    return f"a file{file} of the run cannot be written: {error.strerror}; free space and run again to continue"


def printable(text: str | bytes) -> str:
    """Return a text, such as a path, in printable form, with escapes for bytes that are not UTF-8."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def escape_unprintable() -> None:
    """Make standard output escape characters outside its encoding, such as those of file names that are not UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
