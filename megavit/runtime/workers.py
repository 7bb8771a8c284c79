"""Start the ranks of one machine and return their exit code."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from megavit.config.experiment import ExperimentConfig
from megavit.runtime.run_dir import FAULT, FINISHED, write_exit
from megavit.runtime.signals import HELD_BACK, STACK
from megavit.runtime.startup import gc_paused

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# A signal waits this long until all ranks have been started.
_START_S = 5
_SHUTDOWN_S = 3
# A rank that has lost its peer exits within six seconds; one that waits for a peer during its start never does.
_LOST_S = 9


def num_ranks(config: ExperimentConfig) -> int:
    """Return the number of ranks to start: `run.ranks`, else one per GPU, else the fewest that the layout needs."""
    if config.run.ranks is not None:
        return config.run.ranks
    from megavit.parallel.cpu_backend import run_on_cpu

    if run_on_cpu():
        return config.parallel.tp * config.parallel.pp
    import torch

    return torch.cuda.device_count()


def start_ranks(arguments: list[str], *, ranks: int, run_dir: Path | None = None, module: str = "megavit.train") -> int:
    """Run `python -m module` in every rank, through torch's elastic launcher.

    Args:
        arguments: command-line arguments of each rank.
        ranks: number of processes on this machine.
        run_dir: folder for the exit code of ranks that could not write it themselves.
        module: Python module that each rank runs.

    Returns:
        The exit code of the first rank that failed, or 0.
    """
    with gc_paused():
        from torch.distributed.launcher.api import LaunchConfig

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="megavit",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        # The default is this machine's name on the network, which a laptop may not resolve.
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    return launch_ranks(launch, [sys.executable, "-m", module, *arguments], module=module, run_dir=run_dir)


def launch_ranks(launch: "LaunchConfig", command: list[str], *, module: str, run_dir: Path | None) -> int:
    """Run a command in every rank of this machine and wait for all ranks, without a limit for a save after a signal.

    Args:
        launch: torch's launch settings: number of ranks and rendezvous.
        command: the command of each rank.
        module: a word of the command that identifies the ranks among this process's children.
        run_dir: folder for the exit code of ranks that could not write it themselves.

    Returns:
        The exit code of the first rank that failed, or 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    from megavit.runtime.rendezvous import register_backend

    # The ranks print one message about a failure; the launcher's own traceback would hide it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # After one rank fails, the others treat the agent's SIGTERM as a request to save, and wait for the lost rank.
    launch.shutdown_timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_S))
    # megavit forwards the other signals itself: the agent would end the ranks 30 s after a signal and hide their code.
    launch.signals_to_handle = "SIGHUP"
    if launch.rdzv_backend == "c10d":
        launch.rdzv_backend = register_backend()
    ranks = launch.nproc_per_node
    _forward_signals(module, ranks)
    _kill_stragglers(module, ranks)
    program, *words = literal(command)
    try:
        elastic_launch(launch, program)(*words)
    except ChildFailedError as error:
        return _explain(error, run_dir)
    except RendezvousError as error:
        return _report(f"the machines of the run did not meet at {launch.rdzv_endpoint}: {error}", run_dir)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        return _report(f"ended by {name}; the last checkpoint is valid, run again to continue from it", run_dir)
    return FINISHED


def literal(words: list[str]) -> list[str]:
    """Escape `$` in words, because torch's launcher replaces ${local_rank} and turns $$ into $."""
    return [word.replace("$", "$$") for word in words]


def _forward_signals(module: str, ranks: int) -> None:
    """Forward signals to the ranks while the launcher waits; the third request to stop kills the ranks.

    The signals are blocked here and in the ranks started from now on, until a rank listens. A signal that arrives
    while a rank still imports is therefore neither lost nor fatal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)

    def hand_on() -> None:
        asked = 0
        while True:
            number = signal.sigwait(HELD_BACK)
            asked += number != STACK
            deadline = time.monotonic() + _START_S
            while len(children := running(module)) < ranks and time.monotonic() < deadline:
                time.sleep(0.05)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number if asked < 3 or number == STACK else signal.SIGKILL)

    threading.Thread(target=hand_on, daemon=True).start()


def _kill_stragglers(module: str, ranks: int) -> None:
    """Kill the ranks that are still alive some seconds after the first one has exited.

    Ranks exit together. A rank that waits for a lost peer during its start receives no signal, and torch's agent
    would wait 30 s for it, whatever its time-out is set to (torch 2.15).
    """

    def watch() -> None:
        while len(running(module)) < ranks:
            time.sleep(0.2)
        while len(running(module)) == ranks:
            time.sleep(0.2)
        time.sleep(_LOST_S)
        for child in running(module):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    threading.Thread(target=watch, daemon=True).start()


def running(module: str) -> list[psutil.Process]:
    """Return this process's children whose command line contains `module`."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if module in child.cmdline():
                found.append(child)
    return found


def _explain(error: BaseException, run_dir: Path | None) -> int:
    """Return the exit code of the first failed rank; print a message for a rank that a signal ended."""
    rank, failure = min(getattr(error, "failures").items(), key=lambda item: item[1].timestamp)  # noqa: B009
    if failure.exitcode > 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    hint = " (often the machine ran out of memory: dmesg shows it)" if name == "SIGKILL" else ""
    return _report(f"rank {rank} was ended by {name}{hint}", run_dir)


def _report(message: str, run_dir: Path | None) -> int:
    print(f"megavit: {message}", file=sys.stderr, flush=True)
    write_exit(run_dir, FAULT, message)
    return FAULT
