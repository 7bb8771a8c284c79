"""Start the ranks of one machine and give back their exit code."""

import logging
import os
import sys

from megavit.config import RunConfig
from megavit.outcome import FAULT, FINISHED


def num_ranks(config: RunConfig) -> int:
    """Ranks to start: `run.ranks`, or one per GPU, or without GPUs the fewest that the layout needs."""
    if config.run.ranks is not None:
        return config.run.ranks
    from megavit.parallel.cpu import run_on_cpu

    if run_on_cpu():
        return config.parallel.tp * config.parallel.pp
    import torch

    return torch.cuda.device_count()


def start_ranks(arguments: list[str], *, ranks: int, module: str = "megavit.train") -> int:
    """Run `python -m module` in every rank, through torch's elastic launcher.

    Args:
        arguments: the command line, handed on.
        ranks: processes on this machine.
        module: what each rank runs.

    Returns:
        The code that the first rank to fail left with, or 0.
    """
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
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    try:
        elastic_launch(launch, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return _first_code(error)
    return FINISHED


def _first_code(error: BaseException) -> int:
    failures = getattr(error, "failures", {})
    first = min(failures.values(), key=lambda failure: failure.timestamp, default=None)
    # A rank that a signal ended has a negative code.
    return first.exitcode if first is not None and first.exitcode > 0 else FAULT
