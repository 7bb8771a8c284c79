"""How a rank ends: one of them speaks for all, and none leaves before it has."""

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

from megavit.errors import DISK_ERRORS, ConfigError, escape_unprintable
from megavit.parallel.layout import rank_from_environment, world_size_from_environment
from megavit.runtime.rank_log import RankLog
from megavit.runtime.run_dir import FAULT, USER_ERROR, write_exit

_NOBODY_READS = (
    "megavit: stopped, for the command that read its output has ended; what was saved last is valid: run again to "
    "go on, with the output in a file (… > train.txt)"
)

_WAIT_S = 20.0
_GRACE_S = 6
# Ranks start at different times: one that refuses its settings waits this long for the others to refuse theirs.
_START_S = 300.0
# Later they run in step, and find a fault in the data within this time of each other.
_LAST_S = 10.0


def run_rank(
    work: Callable[[], int],
    *,
    run_dir: Callable[[], Path | None],
    check: Callable[[], object] = lambda: None,
    log: RankLog | None = None,
) -> int:
    """Do a rank's work and turn however it ends into an exit code.

    The first rank to fail says why, for all: it claims the failure in the launcher's store, prints it, and leaves the
    code in `RUN/exit.json`; a rank that fails later, or because a peer has gone, waits for that and leaves silently
    with the same code. The ranks that still wait for the failed one are ended by the launcher.

    What `check` refuses every rank refuses, sooner or later. The store ends with the rank or the machine that holds it,
    so every rank counts itself there when its check is done, and none that refuses leaves before all are counted.

    Args:
        work: the rank's work, to its exit code.
        run_dir: the run's folder, asked for at the end; None where there is none yet.
        check: the checks of the settings, which every rank does before it meets the others.
        log: this rank's own, for what it leaves unsaid.
    """
    log, peers, starting = log or RankLog(), _Peers(), True
    escape_unprintable()
    try:
        check()
        peers.count_checked()
        starting = False
        code = work()
        sys.stdout.flush()
        if rank_from_environment() == 0:
            write_exit(run_dir(), code, None)
        if dist.is_initialized():
            # The launcher ends all ranks as soon as one leaves with another code than 0, such as 75.
            dist.barrier()
    except ConfigError as error:
        return _fail(USER_ERROR, f"megavit: {error}", run_dir(), log, peers, starting=starting)
    except KeyboardInterrupt:
        text = "megavit: interrupted; what was saved last is whole, run again to go on from it"
        return _fail(FAULT, text, run_dir(), log, peers)
    except FloatingPointError as error:
        # Training diverged (`train.on_nonfinite=stop`): a fault of the run, which no stack explains.
        log.write(traceback.format_exc())
        return _fail(FAULT, f"megavit: {error}", run_dir(), log, peers)
    except (OSError, SystemExit) as error:
        if _lost_its_reader(error):
            return _fail(FAULT, _NOBODY_READS, run_dir(), log, peers)
        if isinstance(error, SystemExit):
            raise
        if error.errno not in DISK_ERRORS:
            return _fail(FAULT, traceback.format_exc(), run_dir(), log, peers)
        file = f" {error.filename}" if error.filename else ""
        text = f"a file{file} of the run cannot be written: {error.strerror}; make room and run again to go on"
        return _fail(USER_ERROR, f"megavit: {text}", run_dir(), log, peers, starting=starting)
    except Exception as error:
        if _tells_of_a_lost_peer(error):
            # Of a peer that was killed only the launcher knows; it says so, and ends this rank meanwhile.
            log.write(traceback.format_exc())
            time.sleep(_GRACE_S)
            text = f"rank {rank_from_environment()} has lost the connection to another rank, whose log tells why"
            return _fail(FAULT, text, run_dir(), log, peers)
        return _fail(FAULT, traceback.format_exc(), run_dir(), log, peers)
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


def _fail(
    code: int, message: str, run_dir: Path | None, log: RankLog, peers: "_Peers", *, starting: bool = False
) -> int:
    """Report a failure, or wait until the rank that failed first has reported it; `starting`: still in its checks."""
    log.write(message)
    first = peers.claim(code, wait_s=_START_S if starting else _WAIT_S)
    if first is None:
        print(message, file=log.console, flush=True)
        try:
            write_exit(run_dir, code, message)
        except OSError as error:
            print(f"megavit: the exit code could not be kept in {run_dir}: {error}", file=log.console, flush=True)
        peers.set_reported()
    # Of any other fault the others know nothing, and wait for this rank.
    if starting or (first is None and code == USER_ERROR):
        peers.wait_until_all_know(starting=starting)
    return code if first is None else first


class _Peers:
    """The ranks that were started together, as they know each other through the launcher's store.

    The store stays open: without a launcher the first rank is its server, which ends with the last reference to it.
    """

    def __init__(self) -> None:
        self._world_size = world_size_from_environment()
        self._store: Any = None

    def count_checked(self) -> None:
        """Count this rank among those that are done with their checks, where somebody may wait for that."""
        if self._store_may_end():
            # A store that cannot be reached is reported by what needs it: the process group.
            with suppress(RuntimeError, OSError):
                self._open(_START_S).add(_key("checked"), 1)

    def claim(self, code: int, *, wait_s: float) -> int | None:
        """Claim to be the first rank that failed: None if so, else that rank's code, once it has reported."""
        if self._world_size == 1:
            return None
        mine = f"{rank_from_environment()} {code}"
        try:
            store = self._open(wait_s)
            first = store.compare_set(_key("failure"), "", mine).decode()
            if first != mine:
                store.wait([_key("reported")], timedelta(seconds=wait_s))
        except (RuntimeError, OSError):
            # The store is gone, or the rank that claimed the failure is: better said twice than not at all.
            return None
        with suppress(RuntimeError, OSError):
            # Who reported may have left by now.
            store.add(_key("heard"), 1)
        return None if first == mine else int(first.split()[1])

    def set_reported(self) -> None:
        """Let the ranks leave that wait for this one's report."""
        if self._store is not None:
            with suppress(RuntimeError, OSError):
                self._store.set(_key("reported"), "1")

    def wait_until_all_know(self, *, starting: bool) -> None:
        """Stay until every rank knows of the failure, if the store may end with this rank or its machine.

        While the ranks start, one that is done with its checks counts too: it does not wait for a report.
        """
        if self._store is None or not self._store_may_end():
            return
        deadline = time.monotonic() + (_START_S if starting else _LAST_S)
        with suppress(RuntimeError, OSError):
            while time.monotonic() < deadline:
                known = self._store.add(_key("heard"), 0)
                if starting:
                    known += self._store.add(_key("checked"), 0)
                if known >= self._world_size:
                    return
                time.sleep(0.1)

    def _open(self, wait_s: float) -> Any:
        if self._store is None:
            self._store = shared_store(wait_s)
        return self._store

    def _store_may_end(self) -> bool:
        outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return self._world_size > 1 and not (outlives and os.environ.get("LOCAL_WORLD_SIZE") == str(self._world_size))


def _key(name: str) -> str:
    # A launcher that restarts its workers keeps its store.
    return f"megavit/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def shared_store(wait_s: float = _WAIT_S) -> Any:
    """The launcher's key-value store, or without a launcher the first rank's; None for a world of one.

    Args:
        wait_s: seconds to wait for it to be there.
    """
    world_size = world_size_from_environment()
    if world_size == 1:
        return None
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank_from_environment() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=wait_s),
        # Whoever holds it must not wait for ranks that may be late: it has something to report.
        wait_for_workers=False,
        multi_tenant=True,
    )
