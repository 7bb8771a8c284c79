"""Write one log file per rank: stack traces, faults, and the output of all ranks except rank 0."""

import faulthandler
import os
import signal
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO


class RankLog:
    """The log file of one rank, `RUN/logs/rank_00003.log`; nothing is written before `open`.

    Attributes:
        console: the terminal's standard error, for messages that the user must see from any rank.
    """

    def __init__(self) -> None:
        self.console = sys.stderr
        self._file: TextIO | None = None

    def open(self, run_dir: Path, *, rank: int, world_size: int) -> None:
        """Open the file, and redirect the output of every rank except rank 0 to it.

        A crash writes its stack trace there. SIGUSR2 does so at any time, to show where a rank hangs.

        Args:
            run_dir: the run's folder.
            rank: this process's rank.
            world_size: number of ranks of the run.

        Raises:
            OSError: if the file cannot be written.
        """
        path = run_dir / "logs" / f"rank_{rank:05d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, errors="backslashreplace")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.write(f"{now} rank {rank} of {world_size}, process {os.getpid()} on {socket.gethostname()}")
        faulthandler.enable(self._file)
        faulthandler.register(signal.SIGUSR2, self._file)
        # The launcher has blocked SIGUSR2, which would have ended a process without a handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        if rank != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            self.console = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="backslashreplace")
            os.dup2(self._file.fileno(), sys.stdout.fileno())
            os.dup2(self._file.fileno(), sys.stderr.fileno())

    def write(self, text: str) -> None:
        """Append a line to the file, without printing it."""
        if self._file is not None:
            self._file.write(text + "\n")
