"""Run a megavit command in a process of its own, for a Python process that waits for it."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from types import FrameType
from typing import IO, TextIO

from megavit.errors import ConfigError, RunError
from megavit.runtime.run_dir import FINISHED, STOPPED, USER_ERROR
from megavit.runtime.signals import STOPPING, handlers_restored

_PREFIX = "megavit: "
_LINES_KEPT = 50


@dataclass(frozen=True)
class _Stream:
    """One of the command's streams, and the thread that copies it; none where the command writes to the terminal."""

    thread: threading.Thread | None
    lines: deque[str]


def run_command(arguments: list[str]) -> int:
    """Run `python -m megavit …`, hand signals on to it and show what it prints.

    Args:
        arguments: of the command.

    Returns:
        0, or 75 where a signal has stopped the run and it has saved.

    Raises:
        ConfigError: if the command refuses its settings or the data.
        KeyboardInterrupt: if a SIGINT has ended it without a save.
        RunError: if it fails.
    """
    received: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    with handlers_restored() as may_listen:
        # Before the start: a signal that comes meanwhile is handed on too.
        for number in STOPPING if may_listen else ():
            signal.signal(number, hand_on)
        # In a session of its own: a terminal and Jupyter send SIGINT to a whole process group, and a second SIGINT ends
        # the ranks at once.
        process = subprocess.Popen(
            [sys.executable, "-m", "megavit", *arguments],
            stdout=None if _is_terminal(sys.stdout, 1) else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        for early in received:
            process.send_signal(early)
        processes.append(process)
        output, errors = _copy(process.stdout, sys.stdout), _copy(process.stderr, sys.stderr)
        try:
            code = process.wait()
        finally:
            # Outside the main thread an exception may end the wait.
            if process.poll() is None:
                process.terminate()
    for stream in (output, errors):
        if stream.thread is not None:
            stream.thread.join()
    if code in (FINISHED, STOPPED):
        return code
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    raise _error(code, "".join(errors.lines), arguments)


def _error(code: int, said: str, arguments: list[str]) -> Exception:
    message = said[said.rfind(_PREFIX) :].removeprefix(_PREFIX).strip() if _PREFIX in said else said.strip()
    if code == USER_ERROR:
        return ConfigError(message)
    return RunError(f"megavit {arguments[0]} left with exit code {code}: {message or 'see what it printed'}", code=code)


def _is_terminal(stream: TextIO, descriptor: int) -> bool:
    """Return whether what this process prints goes to a terminal by this descriptor, not to a notebook or a test."""
    try:
        return stream.fileno() == descriptor and stream.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def _copy(source: IO[bytes] | None, target: TextIO) -> _Stream:
    """Copy a stream of the command line by line to what this process prints, and keep its last lines."""
    lines: deque[str] = deque(maxlen=_LINES_KEPT)
    if source is None:
        return _Stream(None, lines)

    def copy() -> None:
        with source:
            for line in source:
                lines.append(line.decode(errors="backslashreplace"))
                target.write(lines[-1])
                target.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return _Stream(thread, lines)
