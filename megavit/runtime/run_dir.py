"""Lock a run's folder for one process, and write the exit code there."""

import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from megavit.errors import ConfigError

# Exit codes: finished; a fault of the program or machine; wrong settings or data; findings of a command that checks
# something; stopped by a signal and saved.
FINISHED, FAULT, USER_ERROR, FINDINGS, STOPPED = 0, 1, 2, 3, 75


def claim_folder(run_dir: Path) -> IO[str]:
    """Lock a folder for this process and mark in `exit.json` that a run is in progress; called by one rank.

    Returns:
        The open lock file (see `lock_folder`).

    Raises:
        ConfigError: if another process holds the lock, or the folder cannot be written.
    """
    lock = lock_folder(run_dir)
    try:
        # Delete the exit code of an earlier run.
        write_exit(run_dir, None, None)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    return lock


def lock_folder(run_dir: Path, *, setting: str = "run.dir", instead: str = "run.name") -> IO[str]:
    """Lock a folder for this process.

    Args:
        run_dir: the folder.
        setting: the setting that names it, for messages.
        instead: the setting that chooses another folder, for messages.

    Returns:
        The lock file, which holds the lock while it is open. The operating system releases the lock when the process
        ends, also after a kill.

    Raises:
        ConfigError: if another process holds the lock, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise ConfigError(
                f"{setting}={run_dir} is in use by {holder}; wait for it, stop it, or choose another {instead}"
            ) from None
        lock.truncate(0)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        lock.flush()
    except OSError as error:
        raise _unwritable(run_dir, error, setting=setting) from error
    return lock


def _unwritable(run_dir: Path, error: OSError, *, setting: str = "run.dir") -> ConfigError:
    return ConfigError(f"{setting}={run_dir} cannot be written: {error.strerror}; choose another")


def write_exit(run_dir: Path | None, code: int | None, error: str | None) -> None:
    """Write the exit code to `RUN/exit.json`, because an outer launcher may hide it; null while the run continues."""
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "exit.json").write_text(json.dumps({"code": code, "error": error}) + "\n")
