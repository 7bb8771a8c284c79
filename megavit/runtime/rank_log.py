"""A file of its own for each rank: stacks, faults, and what all ranks but the first print."""

import faulthandler
import os
import signal
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO


class RankLog:
    """A rank's own log, `RUN/logs/rank_00003.log`; nothing until it is opened.

    Attributes:
        console: where a rank says what everyone must hear, whatever it is.
    """

    def __init__(self) -> None:
        self.console = sys.stderr
        self._file: TextIO | None = None

    def open(self, run_dir: Path, *, rank: int, world_size: int) -> None:
        """Open the file; of every rank but the first, all that is printed from now on goes there.

        A crash leaves its stack there, and so does SIGUSR2 at any time: where is a rank that hangs?

        Args:
            run_dir: the run's folder.
            rank: this one.
            world_size: ranks of the run.

        Raises:
            OSError: if it cannot be written.
        """
        path = run_dir / "logs" / f"rank_{rank:05d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, errors="backslashreplace")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.write(f"{now} rank {rank} of {world_size}, process {os.getpid()} on {socket.gethostname()}")
        faulthandler.enable(self._file)
        faulthandler.register(signal.SIGUSR2, self._file)
        # Whoever started this rank has held it back: without a handler it would have ended the process.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        if rank != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            self.console = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="backslashreplace")
            os.dup2(self._file.fileno(), sys.stdout.fileno())
            os.dup2(self._file.fileno(), sys.stderr.fileno())

    def write(self, text: str) -> None:
        """Add a line to the file alone."""
        if self._file is not None:
            self._file.write(text + "\n")
