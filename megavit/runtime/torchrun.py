"""Run torchrun with the signals and exit codes that a scheduler needs: `python -m megavit.runtime.torchrun OPTIONS`.

torchrun itself turns every rank's exit code into 1, gives ranks 30 seconds to save after a signal, and is killed by
SIGUSR1. This module starts the same agent with the same rendezvous, forwards signals to the ranks, waits for them
without a limit, and exits with their code, or with the code of `cluster_exit_code` on a cluster.
"""

import os
import signal
import sys
from pathlib import Path

from megavit.errors import ConfigError
from megavit.runtime.run_dir import FAULT, FINISHED, STOPPED, USER_ERROR
from megavit.runtime.signals import HELD_BACK

VARIABLE = "MEGAVIT_MAX_RESTARTS"
_AGAIN = 128


def main(arguments: list[str]) -> int:
    """Start this node's ranks and wait for them.

    Args:
        arguments: torchrun's options, followed by `-m megavit.train key=value …`.

    Returns:
        The exit code of this node.
    """
    # Block the signals before the long imports: a signal that arrives meanwhile is forwarded to the ranks later.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    from torch.distributed.run import config_from_args, determine_local_world_size, parse_args

    from megavit.runtime.workers import launch_ranks

    arguments_read = parse_args(arguments)
    if arguments_read.standalone:
        arguments_read.rdzv_backend, arguments_read.rdzv_endpoint = "c10d", "localhost:0"
    # The ranks of a node share its cores; torchrun would set one thread per rank, with a warning.
    ranks = determine_local_world_size(arguments_read.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    launch, command, words = config_from_args(arguments_read)
    # The default is this machine's name on the network, which a laptop may not resolve.
    if arguments_read.standalone:
        launch.local_addr = "localhost"
    run_dir = _run_dir(arguments_read.training_script_args)
    assert isinstance(command, str)
    code = launch_ranks(launch, [command, *words], module=arguments_read.training_script, run_dir=run_dir)
    return cluster_exit_code(code, run_dir, node=str(arguments_read.node_rank))


def _run_dir(overrides: list[str]) -> Path | None:
    """Return the run's folder; None if the settings are wrong, which the ranks report."""
    from megavit.config.compose import AUTO_MODEL, compose

    try:
        # The run's folder does not depend on the model.
        return Path(compose([text for text in overrides if text != AUTO_MODEL]).run.dir)
    except ConfigError:
        return None


def cluster_exit_code(code: int, run_dir: Path | None, *, node: str) -> int:
    """Return the exit code of a node: the run's code plus 128 if the cluster should restart the run.

    Kubeflow's operator and the rules of a Kubernetes Job restart a container that exits with 128 or more, and do not
    restart one that exits with less. Such a cluster sets MEGAVIT_MAX_RESTARTS.

    A run that was stopped and has saved is always restarted. A crashed run is restarted at most MEGAVIT_MAX_RESTARTS
    times in a row; the run's folder holds the count since the last new checkpoint. Without the variable the code is
    returned unchanged.

    Args:
        code: the run's exit code (see `megavit.runtime.run_dir`).
        run_dir: the run's folder; None if the settings are wrong.
        node: this machine's number within the job; each machine has its own count.
    """
    limit = os.environ.get(VARIABLE)
    if limit is None or run_dir is None:
        return code
    count = run_dir / "launch" / f"crashes-{node}"
    try:
        if code in (FINISHED, USER_ERROR, STOPPED):
            count.unlink(missing_ok=True)
            return code + _AGAIN if code == STOPPED else code
        crashes = _crashes(count, run_dir) + 1
        if crashes <= int(limit):
            _say(f"crash {crashes} in a row: the cluster may restart the job")
            return FAULT + _AGAIN
        # Delete the count: a user who submits the job again has changed something.
        count.unlink()
        _say(f"crashed {crashes} times in a row (cluster.max_restarts={limit}): not restarted")
    except OSError as error:
        _say(f"{count} cannot be written ({error.strerror}): not restarted, because crashes cannot be counted")
    return FAULT


def _crashes(count: Path, run_dir: Path) -> int:
    """Return the number of crashes in a row before this one, and write the count that includes this one."""
    latest = _read(run_dir / "checkpoints" / "latest") or "none"
    before, _, seen = _read(count).partition(" ")
    crashes = int(before) if before.isdigit() and seen == latest else 0
    count.parent.mkdir(parents=True, exist_ok=True)
    count.write_text(f"{crashes + 1} {latest}\n")
    return crashes


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _say(message: str) -> None:
    print(f"megavit: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
