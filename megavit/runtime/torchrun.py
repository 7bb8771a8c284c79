"""torchrun with the signals and exit codes that a scheduler needs: `python -m megavit.runtime.torchrun OPTIONS`.

torchrun itself turns every rank's exit code into 1, gives ranks half a minute to save after a signal, and dies of a
SIGUSR1. This one starts the same agent with the same rendezvous, hands signals on to the ranks, waits for them as long
as they take, and leaves with their code (or, where a cluster reads codes alone, as `megavit.runtime.restarts` says).
"""

import os
import signal
import sys
from pathlib import Path

from megavit.errors import ConfigError
from megavit.runtime.restarts import cluster_exit_code
from megavit.runtime.signals import HELD_BACK


def main(arguments: list[str]) -> int:
    """Start this node's ranks and wait for them.

    Args:
        arguments: torchrun's, up to `-m megavit.train key=value …`.
    """
    # Before the long imports: asked to stop meanwhile, the ranks will hear of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    from torch.distributed.run import config_from_args, determine_local_world_size, parse_args

    from megavit.runtime.workers import launch_ranks

    arguments_read = parse_args(arguments)
    if arguments_read.standalone:
        arguments_read.rdzv_backend, arguments_read.rdzv_endpoint = "c10d", "localhost:0"
    # The ranks of a node share its cores; torchrun would give each one thread, and warn of it.
    ranks = determine_local_world_size(arguments_read.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    launch, command, words = config_from_args(arguments_read)
    # Not this machine's name on the network, which a laptop may not resolve.
    if arguments_read.standalone:
        launch.local_addr = "localhost"
    run_dir = _run_dir(arguments_read.training_script_args)
    assert isinstance(command, str)
    code = launch_ranks(launch, [command, *words], module=arguments_read.training_script, run_dir=run_dir)
    return cluster_exit_code(code, run_dir, node=str(arguments_read.node_rank))


def _run_dir(overrides: list[str]) -> Path | None:
    """The folder of the run; None where its settings are wrong, which the ranks will say."""
    from megavit.config.compose import AUTO_MODEL, compose

    try:
        # The network has no say in where the run lies.
        return Path(compose([text for text in overrides if text != AUTO_MODEL]).run.dir)
    except ConfigError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
