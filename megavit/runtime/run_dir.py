"""A run's folder: which process uses it, and the exit code of the last one."""

import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from megavit.errors import ConfigError

# Exit codes: done; a fault of the program or machine; wrong settings or data; what a checking command looked for was
# found; stopped by a signal and saved.
FINISHED, FAULT, USER_ERROR, FINDINGS, STOPPED = 0, 1, 2, 3, 75


def claim_folder(run_dir: Path) -> IO[str]:
    """Claim a folder for this process and mark there that a run is under way; one rank calls this.

    Returns:
        What holds the claim (see `lock_folder`).

    Raises:
        ConfigError: if another process holds it, or the folder cannot be written.
    """
    lock = lock_folder(run_dir)
    try:
        # The last run's code must not stand for this one's.
        write_exit(run_dir, None, None)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    return lock


def lock_folder(run_dir: Path) -> IO[str]:
    """Claim a folder for this process.

    Returns:
        What holds the claim as long as it is open; the system releases it when the process ends, however it ends.

    Raises:
        ConfigError: if another process holds it, or the folder cannot be written.
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
                f"run.dir={run_dir} is in use by {holder}; wait for it, stop it, or choose another run.name"
            ) from None
        lock.truncate(0)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        lock.flush()
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    return lock


def _unwritable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run.dir={run_dir} cannot be written: {error.strerror}; choose another")


def write_exit(run_dir: Path | None, code: int | None, error: str | None) -> None:
    """Write the exit code to `RUN/exit.json`, since an outer launcher may hide it; null while the run goes on."""
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "exit.json").write_text(json.dumps({"code": code, "error": error}) + "\n")
