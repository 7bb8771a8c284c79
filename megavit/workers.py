"""Start the ranks of one machine and give back their exit code."""

import logging
import os
import signal
import sys
from pathlib import Path

from megavit.config import RunConfig
from megavit.exits import FAULT, FINISHED, write_exit


def num_ranks(config: RunConfig) -> int:
    """Ranks to start: `run.ranks`, or one per GPU, or without GPUs the fewest that the layout needs."""
    if config.run.ranks is not None:
        return config.run.ranks
    from megavit.parallel.cpu import run_on_cpu

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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say themselves what went wrong, once; the launcher's own account would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    try:
        elastic_launch(launch, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return _explain(error, run_dir)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        return _report(f"ended by {name}; what was saved last is whole, run again to go on from it", run_dir)
    return FINISHED


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
