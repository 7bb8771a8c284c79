"""How a rank ends: one of them speaks for all, and none leaves before it has."""

import errno
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megavit.errors import ConfigError
from megavit.exits import FAULT, USER_ERROR, write_exit
from megavit.parallel.layout import rank_from_environment, world_size_from_environment
from megavit.rank_log import RankLog

# What a full disk, a used-up quota or a disk that became read-only says.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_NOBODY_READS = (
    "megavit: stopped, for the command that read its output has ended; what was saved last is valid: run again to "
    "go on, with the output in a file (… > train.txt)"
)

_WAIT_S = 20
_GRACE_S = 6
# How much later than another a rank may find the same fault in its settings.
_LAST_S = 10


def run_as_rank(work: Callable[[], int], *, run_dir: Callable[[], Path | None], log: RankLog | None = None) -> int:
    """Do a rank's work and turn however it ends into an exit code.

    The first rank to fail says why, for all: it claims the failure in the launcher's store, prints it, and leaves the
    code in `RUN/exit.json`; a rank that fails later, or because a peer has gone, waits for that and leaves silently
    with the same code. The ranks that still wait for the failed one are ended by the launcher. What is wrong with a
    setting every rank finds, so the first waits for the others where the store ends with it.

    Args:
        work: the rank's work, to its exit code.
        run_dir: the run's folder, asked for at the end; None where there is none yet.
        log: this rank's own, for what it leaves unsaid.
    """
    log = log or RankLog()
    try:
        code = work()
        sys.stdout.flush()
        if rank_from_environment() == 0:
            write_exit(run_dir(), code, None)
        if dist.is_initialized():
            # The launcher ends all ranks as soon as one leaves with another code than 0, such as 75.
            dist.barrier()
    except ConfigError as error:
        return _fail(USER_ERROR, f"megavit: {error}", run_dir(), log)
    except KeyboardInterrupt:
        return _fail(
            FAULT, "megavit: interrupted; what was saved last is whole, run again to go on from it", run_dir(), log
        )
    except FloatingPointError as error:
        # Training diverged (`train.on_nonfinite=stop`): a fault of the run, which no stack explains.
        log.write(traceback.format_exc())
        return _fail(FAULT, f"megavit: {error}", run_dir(), log)
    except (OSError, SystemExit) as error:
        if _lost_its_reader(error):
            return _fail(FAULT, _NOBODY_READS, run_dir(), log)
        if isinstance(error, SystemExit):
            raise
        if error.errno not in _DISK_ERRORS:
            return _fail(FAULT, traceback.format_exc(), run_dir(), log)
        file = f" {error.filename}" if error.filename else ""
        told = f"a file{file} of the run cannot be written: {error.strerror}; make room and run again to go on"
        return _fail(USER_ERROR, f"megavit: {told}", run_dir(), log)
    except Exception as error:
        if _tells_of_a_lost_peer(error):
            # Of a peer that was killed only the launcher knows; it says so, and ends this rank meanwhile.
            log.write(traceback.format_exc())
            time.sleep(_GRACE_S)
            told = f"rank {rank_from_environment()} has lost the connection to another rank, whose log tells why"
            return _fail(FAULT, told, run_dir(), log)
        return _fail(FAULT, traceback.format_exc(), run_dir(), log)
    return code


def _lost_its_reader(error: OSError | SystemExit) -> bool:
    """Whether standard output is a pipe that nobody reads any more; if so, the rest of the output goes nowhere."""
    if isinstance(error, SystemExit):
        # How rich leaves, which has sent the output nowhere itself.
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _tells_of_a_lost_peer(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "onnection" in str(error) and world_size_from_environment() > 1


def _fail(code: int, message: str, run_dir: Path | None, log: RankLog) -> int:
    log.write(message)
    claim = _claim(code)
    if claim is not None:
        return claim
    print(message, file=log.console, flush=True)
    try:
        write_exit(run_dir, code, message)
    except OSError as error:
        print(f"megavit: the exit code could not be kept in {run_dir}: {error}", file=log.console, flush=True)
    _let_others_leave(code)
    return code


def _claim(code: int) -> int | None:
    """Claim to be the first rank that failed: None if so, else that rank's code, once it has reported."""
    try:
        store = shared_store()
        if store is None:
            return None
        mine = f"{rank_from_environment()} {code}"
        first = store.compare_set(_key("failure"), "", mine).decode()
        if first == mine:
            return None
        store.wait([_key("reported")], timedelta(seconds=_WAIT_S))
    except (RuntimeError, OSError):
        # The store is gone, or the rank that claimed the failure is: better said twice than not at all.
        return None
    with suppress(RuntimeError, OSError):
        # Who spoke may have left by now.
        store.add(_key("heard"), 1)
    return int(first.split()[1])


def _let_others_leave(code: int) -> None:
    """Tell the ranks that this one has spoken; stay until all know, if the store may end with it or its machine.

    Only for what is wrong with a setting: of any other fault the others know nothing, and wait for this rank.
    """
    world_size = world_size_from_environment()
    outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    stays = code == USER_ERROR and not (outlives and os.environ.get("LOCAL_WORLD_SIZE") == str(world_size))
    deadline = time.monotonic() + (_LAST_S if stays else 0)
    with suppress(RuntimeError, OSError):
        # Where there is no store nobody is left to be told.
        store = shared_store()
        if store is None:
            return
        store.set(_key("reported"), "1")
        while time.monotonic() < deadline and store.add(_key("heard"), 0) < world_size - 1:
            time.sleep(0.1)


def _key(name: str) -> str:
    # A launcher that restarts its workers keeps its store.
    return f"megavit/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def shared_store() -> Any:
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
