"""Start the ranks of one machine and give back their exit code."""

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

# Ranks that have not been started by then are not going to be.
_START_S = 5
_SHUTDOWN_S = 3
# A rank that has lost its peer says so by itself within six seconds; one that waits in its start never would.
_LOST_S = 9


def num_ranks(config: ExperimentConfig) -> int:
    """Ranks to start: `run.ranks`, or one per GPU, or without GPUs the fewest that the layout needs."""
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
        arguments: the command line, handed on.
        ranks: processes on this machine.
        run_dir: where to leave the exit code of ranks that could not do it themselves.
        module: what each rank runs.

    Returns:
        The code that the first rank to fail left with, or 0.
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
        # Not this machine's name on the network, which a laptop may not resolve.
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    return launch_ranks(launch, [sys.executable, "-m", module, *arguments], module=module, run_dir=run_dir)


def launch_ranks(launch: "LaunchConfig", command: list[str], *, module: str, run_dir: Path | None) -> int:
    """Run a command in every rank of this machine and wait for them, however long they take to save after a signal.

    Args:
        launch: how many ranks, and where the machines meet.
        command: what each runs.
        module: the word of the command by which the ranks are known among this process's children.
        run_dir: where to leave the exit code of ranks that could not do it themselves.

    Returns:
        The code that the first rank to fail left with, or 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # The ranks say themselves what went wrong, once; the launcher's own account would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Where one rank has failed, the others take the agent's SIGTERM for a wish to stop, and wait for the lost one.
    launch.shutdown_timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_S))
    # The others are handed on below instead: the agent would give the ranks 30 s to save and then end them, and would
    # not tell their code.
    launch.signals_to_handle = "SIGHUP"
    ranks = launch.nproc_per_node
    _forward_signals(module, ranks)
    _kill_stragglers(module, ranks)
    program, *words = literal(command)
    try:
        elastic_launch(launch, program)(*words)
    except ChildFailedError as error:
        return _explain(error, run_dir)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        return _report(f"ended by {name}; what was saved last is whole, run again to go on from it", run_dir)
    return FINISHED


def literal(words: list[str]) -> list[str]:
    """Words that torch, which replaces ${local_rank} in each and reads $$ as one $, hands on to a rank as they were."""
    return [word.replace("$", "$$") for word in words]


def _forward_signals(module: str, ranks: int) -> None:
    """Hand signals to the ranks and go on waiting for them; the third one that asks to stop ends them.

    The signals are blocked here, and so in the ranks that are started from now on, until these listen: one that comes
    while they still import is not lost and ends nobody.
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
    """End the ranks that are still there some seconds after one has gone.

    Ranks leave together. One that waits for a lost peer in its start hears no signal, and torch's agent would wait for
    it for 30 s, whatever its time-out is set to (torch 2.15).
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
    """This process's children that run a module."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if module in child.cmdline():
                found.append(child)
    return found


def _explain(error: BaseException, run_dir: Path | None) -> int:
    """The first failed rank's code; a rank that a signal ended could not speak for itself."""
    rank, failure = min(getattr(error, "failures").items(), key=lambda item: item[1].timestamp)  # noqa: B009
    if failure.exitcode > 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    hint = " (often the machine ran out of memory: dmesg tells)" if name == "SIGKILL" else ""
    return _report(f"rank {rank} was ended by {name}{hint}", run_dir)


def _report(message: str, run_dir: Path | None) -> int:
    print(f"megavit: {message}", file=sys.stderr, flush=True)
    write_exit(run_dir, FAULT, message)
    return FAULT
