"""A run of a sweep as a process of its own: `megavit train …`."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from megavit.errors import ConfigError
from megavit.runtime.run_dir import write_exit
from megavit.train.sweep.machine import Slot
from megavit.train.sweep.plan import PlannedRun
from megavit.train.sweep.results import CONSOLE, Outcome, read_outcome

_PR_SET_PDEATHSIG = 1
# A run whose sweep was killed saves before it leaves.
_SAVING_S = 300
# Locked as long as the process of a run lives, also while it still starts.
_LOCK = ".sweep.lock"


class RunProcess:
    """The process of a run.

    It is a process group of its own: Ctrl-C reaches the sweep alone, which hands it on once. Signals that ask to stop
    are blocked in the sweep, and so in the run until it listens: none is lost while it starts.

    Args:
        run: the run.
        slot: its part of the machine.
        program: the words before its settings.
    """

    def __init__(self, run: PlannedRun, slot: Slot, *, program: Sequence[str]) -> None:
        self.run, self.slot = run, slot
        self.started = time.monotonic()
        self.is_pruned = False
        run.dir.mkdir(parents=True, exist_ok=True)
        # The code that is read at the end is this start's.
        write_exit(run.dir, None, None)
        lock = _lock(run.dir)
        assert lock is not None, run.dir
        # The process inherits the lock; it ends with the process.
        with lock, (run.dir / CONSOLE).open("ab") as console:
            self._process = subprocess.Popen(
                [*program, *run.overrides],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment(run.ranks)},
                pass_fds=(lock.fileno(),),
                process_group=0,
                preexec_fn=_stop_with_parent(),
            )

    @property
    def returncode(self) -> int | None:
        """The exit code, None while the run goes on."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def send(self, number: int) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def outcome(self) -> Outcome:
        """Return how it ended."""
        return read_outcome(self.run.dir, returncode=self.returncode)


def wait_for_folders(run_dirs: list[Path], *, say: Callable[[str], None]) -> None:
    """Wait for runs of a killed sweep that still save.

    Raises:
        ConfigError: if one of them does not end.
    """
    deadline = time.monotonic() + _SAVING_S
    for run_dir in run_dirs:
        said = False
        while run_dir.is_dir():
            lock = _lock(run_dir)
            if lock is not None:
                lock.close()
                break
            if time.monotonic() > deadline:
                raise ConfigError(f"{run_dir}: a process of an earlier start still trains this run; stop it")
            if not said:
                say(f"{run_dir.name}  waits for the process of an earlier start, which saves")
                said = True
            time.sleep(0.2)


def _lock(run_dir: Path) -> IO[str] | None:
    """Lock a run's folder for its process; None if a process has it."""
    lock = (run_dir / _LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _stop_with_parent() -> Callable[[], None] | None:
    """Return what makes Linux ask a run to stop when the sweep's process dies, however it dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
