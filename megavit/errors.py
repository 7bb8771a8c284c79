"""The error for wrong settings and data, and printable text for its message."""

import errno
import io
import os
import sys

# Errors of a full disk, a used-up quota and a disk that became read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ConfigError(ValueError):
    """A wrong configuration or wrong data: reported as one message without a traceback, exit code 2.

    The message names the setting by its path, shows the value and the arithmetic that failed, and says what to set
    instead. A fault of megavit itself is an `assert` or any other exception: it prints its stack, exit code 1.
    """


def printable(text: str | bytes) -> str:
    """Return a text, such as a path, in printable form: bytes that are not UTF-8 are escaped."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def escape_unprintable() -> None:
    """Make standard output escape characters outside its encoding, as in file names that are not UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
