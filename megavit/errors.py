"""The error for wrong settings and data, and text that can be printed in its message."""

import errno
import io
import os
import sys

# What a full disk, a used-up quota or a disk that became read-only says.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ConfigError(ValueError):
    """A wrong configuration or wrong data: shown as one message without a traceback, exit code 2.

    The message names the setting by its path, shows the value and the arithmetic that failed, and the way out.
    Whatever is our own mistake is an `assert` or any other exception, and leaves with its stack and exit code 1.
    """


def printable(text: str | bytes) -> str:
    """A text, such as a path, as it can be printed: bytes that are no UTF-8 are escaped."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def escape_unprintable() -> None:
    """Have standard output escape what its encoding does not hold, such as names of files that are no UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
