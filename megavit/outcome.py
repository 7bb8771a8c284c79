"""How a process ends: exit codes, and one rank that speaks for all."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megavit.errors import ConfigError
from megavit.parallel.layout import rank_from_environment, world_size_from_environment

FINISHED, FAULT, USER_ERROR, STOPPED = 0, 1, 2, 75

_FAILURE = "megavit/failure"
_REPORTED = "megavit/failure_reported"
_WAIT_S = 20


def run_as_rank(work: Callable[[], int], *, run_dir: Callable[[], Path | None]) -> int:
    """Do a rank's work and turn however it ends into an exit code.

    The first rank to fail says why, for all: it claims the failure in the launcher's store, prints it, and leaves the
    code in `RUN/exit.json`; a rank that fails later, or because a peer has gone, waits for that and leaves silently
    with the same code. The ranks that still wait for the failed one are ended by the launcher.

    Args:
        work: the rank's work, to its exit code.
        run_dir: the run's folder, asked for at the end; None where there is none yet.
    """
    try:
        code = work()
    except ConfigError as error:
        return _fail(USER_ERROR, f"megavit: {error}", run_dir())
    except Exception:
        return _fail(FAULT, traceback.format_exc(), run_dir())
    if rank_from_environment() == 0:
        write_exit(run_dir(), code, None)
    return code


def write_exit(run_dir: Path | None, code: int, error: str | None) -> None:
    """Leave the exit code where an outer launcher's own code would hide it."""
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "exit.json").write_text(json.dumps({"code": code, "error": error}) + "\n")


def _fail(code: int, message: str, run_dir: Path | None) -> int:
    store = _shared_store()
    if store is None:
        print(message, file=sys.stderr, flush=True)
        write_exit(run_dir, code, message)
        return code
    mine = f"{rank_from_environment()} {code}"
    first = store.compare_set(_FAILURE, "", mine).decode()
    if first == mine:
        print(message, file=sys.stderr, flush=True)
        write_exit(run_dir, code, message)
        store.set(_REPORTED, "1")
        return code
    store.wait([_REPORTED], timedelta(seconds=_WAIT_S))
    return int(first.split()[1])


def _shared_store() -> Any:
    """The launcher's key-value store, which outlives any one rank; None for a world of one."""
    world_size = world_size_from_environment()
    if world_size == 1:
        return None
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank_from_environment() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=_WAIT_S),
        multi_tenant=True,
    )
