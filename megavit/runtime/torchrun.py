"""torchrun with the signals and exit codes that a scheduler needs: `python -m megavit.runtime.torchrun OPTIONS`.

torchrun itself turns every rank's exit code into 1, gives ranks half a minute to save after a signal, and dies of a
SIGUSR1. This one starts the same agent with the same rendezvous, hands signals on to the ranks, waits for them as long
as they take, and exits with their code, or with the code that `cluster_exit_code` gives a cluster.
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


def cluster_exit_code(code: int, run_dir: Path | None, *, node: str) -> int:
    """Return the code that a node exits with: 128 more than its own where the run should be started again.

    Kubeflow's operator, and the rules of a Kubernetes Job, restart a container that exits with 128 or more and give up
    one that exits with less. Such a cluster sets MEGAVIT_MAX_RESTARTS.

    A run that was stopped, and has saved, always should; a crashed one at most MEGAVIT_MAX_RESTARTS times in a row,
    counted in the run's folder since its last new checkpoint. Without that variable the code stays as it is.

    Args:
        code: the run's (see `megavit.runtime.run_dir`).
        run_dir: the run's folder; None where its settings are wrong.
        node: this machine's number within the job; each counts for itself.
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
            _say(f"crashed, {crashes} in a row: to be started again")
            return FAULT + _AGAIN
        # Whoever submits the job again has changed something.
        count.unlink()
        _say(f"crashed {crashes} times in a row (cluster.max_restarts={limit}), not to be started again")
    except OSError as error:
        _say(f"{count} cannot be written ({error.strerror}), and without a count nothing is started again")
    return FAULT


def _crashes(count: Path, run_dir: Path) -> int:
    """Crashes in a row before this one, which is counted for the next."""
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
