"""Turn the way a rank ends into one exit code and one error message for all ranks."""

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

from megavit.errors import DISK_ERRORS, ConfigError, disk_full, escape_unprintable
from megavit.parallel.layout import rank_from_environment, world_size_from_environment
from megavit.runtime.rank_log import RankLog
from megavit.runtime.run_dir import FAULT, USER_ERROR, write_exit

_NOBODY_READS = (
    "megavit: stopped: the command that read its output has ended; the last checkpoint is valid: run again to "
    "continue, with the output in a file (… > train.txt)"
)

_WAIT_S = 20.0
_GRACE_S = 6
# Ranks start at different times: a rank that rejects its settings waits this long until the others reject theirs.
_START_S = 300.0
# Later the ranks run in step and find a fault in the data within this time of each other.
_LAST_S = 10.0


def run_rank(
    work: Callable[[], int],
    *,
    run_dir: Callable[[], Path | None],
    check: Callable[[], object] = lambda: None,
    log: RankLog | None = None,
) -> int:
    """Run a rank's work and return its exit code, whether it finishes or fails.

    The first rank that fails reports for all ranks: it records the failure in the launcher's store, prints the message
    and writes the code to `RUN/exit.json`. A rank that fails later, or because it lost a peer, waits for this report
    and exits silently with the same code. The launcher ends the ranks that still wait for the failed one.

    If `check` fails on one rank, it fails on every rank, sooner or later. The store ends with the rank or the machine
    that holds it. Therefore every rank counts itself in the store after its check, and a rank that fails waits until
    all ranks are counted.

    Args:
        work: runs the rank and returns its exit code.
        run_dir: returns the run's folder, or None if there is none yet; called at the end.
        check: checks the settings; every rank calls it before the process group exists.
        log: this rank's log, which also receives what is not printed.

    Returns:
        The exit code of this rank (see `megavit.runtime.run_dir`).
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
            # The launcher ends all ranks as soon as one exits with a code other than 0, such as 75.
            dist.barrier()
    except ConfigError as error:
        return _fail(USER_ERROR, f"megavit: {error}", run_dir(), log, peers, starting=starting)
    except KeyboardInterrupt:
        text = "megavit: interrupted; the last checkpoint is valid, run again to continue from it"
        return _fail(FAULT, text, run_dir(), log, peers)
    except FloatingPointError as error:
        # Training diverged (`train.on_nonfinite=stop`): a stack trace would not explain it.
        log.write(traceback.format_exc())
        return _fail(FAULT, f"megavit: {error}", run_dir(), log, peers)
    except (OSError, SystemExit) as error:
        if _lost_its_reader(error):
            return _fail(FAULT, _NOBODY_READS, run_dir(), log, peers)
        if isinstance(error, SystemExit):
            raise
        if error.errno not in DISK_ERRORS:
            return _fail(FAULT, traceback.format_exc(), run_dir(), log, peers)
        return _fail(USER_ERROR, f"megavit: {disk_full(error)}", run_dir(), log, peers, starting=starting)
    except Exception as error:
        if _is_lost_connection(error):
            # Only the launcher knows that a peer was killed. It reports that and ends this rank during the sleep.
            log.write(traceback.format_exc())
            time.sleep(_GRACE_S)
            text = f"rank {rank_from_environment()} has lost the connection to another rank, whose log shows why"
            return _fail(FAULT, text, run_dir(), log, peers)
        return _fail(FAULT, traceback.format_exc(), run_dir(), log, peers)
    return code


def _lost_its_reader(error: OSError | SystemExit) -> bool:
    """Return whether standard output is a pipe without a reader; if so, redirect it to /dev/null."""
    if isinstance(error, SystemExit):
        # rich exits this way, after it has redirected the output itself.
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "onnection" in str(error) and world_size_from_environment() > 1


def _fail(
    code: int, message: str, run_dir: Path | None, log: RankLog, peers: "_Peers", *, starting: bool = False
) -> int:
    """Report a failure, or wait until the rank that failed first has reported it.

    `starting` is true while the rank still runs its checks.
    """
    log.write(message)
    first = peers.claim(code, wait_s=_START_S if starting else _WAIT_S)
    if first is None:
        print(message, file=log.console, flush=True)
        try:
            write_exit(run_dir, code, message)
        except OSError as error:
            print(f"megavit: cannot write the exit code to {run_dir}: {error}", file=log.console, flush=True)
        peers.set_reported()
    # After any other fault this rank does not wait: the others do not notice the fault, and the launcher ends them.
    if starting or (first is None and code == USER_ERROR):
        peers.wait_until_all_know(starting=starting)
    return code if first is None else first


class _Peers:
    """Exchange failures between the ranks of one start through the launcher's key-value store.

    The store stays open: without a launcher the first rank serves it, and the server ends with the last reference.
    """

    def __init__(self) -> None:
        self._world_size = world_size_from_environment()
        self._store: Any = None

    def count_checked(self) -> None:
        """Count this rank as checked, if another rank may wait for that."""
        if self._store_may_end():
            # The process group needs the store too and reports it if it cannot be reached.
            with suppress(RuntimeError, OSError):
                self._open(_START_S).add(_key("checked"), 1)

    def claim(self, code: int, *, wait_s: float) -> int | None:
        """Return None if this rank is the first that failed, else the first one's code after its report."""
        if self._world_size == 1:
            return None
        mine = f"{rank_from_environment()} {code}"
        try:
            store = self._open(wait_s)
            first = store.compare_set(_key("failure"), "", mine).decode()
            if first != mine:
                store.wait([_key("reported")], timedelta(seconds=wait_s))
        except (RuntimeError, OSError):
            # The store or the rank that failed first is gone: report twice rather than not at all.
            return None
        with suppress(RuntimeError, OSError):
            # The rank that reported may have exited already.
            store.add(_key("heard"), 1)
        return None if first == mine else int(first.split()[1])

    def set_reported(self) -> None:
        """Release the ranks that wait for this rank's report."""
        if self._store is not None:
            with suppress(RuntimeError, OSError):
                self._store.set(_key("reported"), "1")

    def wait_until_all_know(self, *, starting: bool) -> None:
        """Wait until every rank knows of the failure, if the store may end with this rank or its machine.

        During the start, a rank that passed its checks counts too, because it does not wait for a report.
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
    # A launcher keeps its store when it restarts its workers.
    return f"megavit/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def shared_store(wait_s: float = _WAIT_S) -> Any:
    """Open the key-value store of the launcher, or of the first rank if there is no launcher.

    Args:
        wait_s: seconds to wait until the store can be reached.

    Returns:
        The store; None for a world size of 1.
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
        # The rank that holds the store must not wait for late ranks: it has a failure to report.
        wait_for_workers=False,
        multi_tenant=True,
    )
