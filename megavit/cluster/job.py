"""Plan a run as a job, and check it before submission against the requested nodes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megavit.cluster.config import ClusterConfig, Kind
from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import write_home_out
from megavit.config.portable import make_portable
from megavit.config.settings import run_types
from megavit.config.validate import validate
from megavit.data.sources.remote import bare, is_url
from megavit.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """A run on a number of nodes.

    Attributes:
        overrides: the run's settings with `~` expanded, because the job's home directory may be another.
        config: the checked configuration of these settings.
        nodes: number of machines.
        gpus_per_node: GPUs of the job on each machine; 0 computes on the CPU.
        ranks_per_node: processes on each machine.
    """

    overrides: list[str]
    config: ExperimentConfig
    nodes: int
    gpus_per_node: int
    ranks_per_node: int

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.config.run.name

    @property
    def run_dir(self) -> Path:
        """Return the run's folder, absolute."""
        return Path(self.config.run.dir).absolute()

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def device(self) -> str:
        """Return the device of the ranks, in the form of MEGAVIT_DEVICE."""
        return "cuda" if self.gpus_per_node else "cpu"

    def __str__(self) -> str:
        count, what = (self.gpus_per_node, "GPU") if self.gpus_per_node else (self.ranks_per_node, "CPU rank")
        each = f"{count} {what}{'s' if count > 1 else ''}"
        nodes = f"{self.nodes} nodes × " if self.nodes > 1 else ""
        return f"{self.name} on {nodes}{each}"


@dataclass(frozen=True)
class ArrayJob(Job):
    """The runs of a sweep as one job array; the folder is the sweep's.

    Attributes:
        tasks: the runs.
    """

    tasks: tuple[Job, ...] = ()

    def __str__(self) -> str:
        return f"an array of {len(self.tasks)} runs, each {super().__str__()}"


def gather_array(jobs: list[Job], *, name: str) -> ArrayJob:
    """Return runs of a sweep as one job array.

    Args:
        jobs: the runs.
        name: the array's name; its folder is multirun/NAME.

    Raises:
        ConfigError: if the runs need different numbers of ranks: the tasks of an array have the same resources.
    """
    first = jobs[0]
    for job in jobs:
        if (job.ranks_per_node, job.gpus_per_node) != (first.ranks_per_node, first.gpus_per_node):
            raise ConfigError(
                f"cluster.array=true: {first.name} has {first.ranks_per_node} ranks on each node and {job.name} has "
                f"{job.ranks_per_node}, but the tasks of an array have the same resources; set cluster.ranks_per_node, "
                f"or cluster.array=false"
            )
    run = replace(first.config.run, name=name, dir=str(Path("multirun") / name))
    return ArrayJob(
        first.overrides,
        replace(first.config, run=run),
        first.nodes,
        first.gpus_per_node,
        first.ranks_per_node,
        tuple(jobs),
    )


def plan_job(
    overrides: list[str], cluster: ClusterConfig, *, resolve: Callable[[list[str]], list[str]] = lambda typed: typed
) -> Job:
    """Compose a run and check it for a cluster.

    Args:
        overrides: the run's settings of the command line.
        cluster: checked settings of the cluster.
        resolve: replaces `model=auto` by the settings of the weights to start from.

    Raises:
        ConfigError: if the run cannot start on the cluster.
    """
    for text in overrides:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
            raise ConfigError(f"{text!r} holds a line break or another control character")
    overrides = [write_home_out(text, run_types()) for text in overrides]
    overrides = make_portable(resolve(overrides))
    config = compose(overrides)
    layout = config.parallel
    if config.run.ranks is not None:
        raise ConfigError(
            f"run.ranks={config.run.ranks} is a setting of megavit train; a job's ranks are cluster.nodes × "
            f"cluster.ranks_per_node (with GPUs cluster.gpus_per_node)"
        )
    gpus = cluster.gpus_per_node
    if gpus is None:
        if cluster.kind is not Kind.local:
            raise ConfigError("cluster.gpus_per_node=null: set the number of GPUs of a node, 0 to compute on the CPU")
        gpus = _count_gpus()
    ranks = cluster.ranks_per_node or gpus or max(1, -(-layout.tp * layout.pp // cluster.nodes))
    job = Job(overrides, config, cluster.nodes, gpus, ranks)
    if job.world_size % (layout.tp * layout.pp):
        raise ConfigError(
            f"cluster.nodes={job.nodes} × {ranks} ranks on each = {job.world_size} is not a multiple of parallel.tp="
            f"{layout.tp} × parallel.pp={layout.pp} = {layout.tp * layout.pp}; change cluster.nodes, or lower tp or pp"
        )
    if ranks % layout.tp and job.nodes > 1 and not cluster.tp_across_nodes:
        raise ConfigError(
            f"parallel.tp={layout.tp} does not fit into nodes of {ranks} ranks: {ranks} mod {layout.tp} = "
            f"{ranks % layout.tp}, so a tensor-parallel group would span two nodes, with two all-reduces per layer "
            f"and direction over the network; set parallel.tp={_largest_divisor(ranks, layout.tp)}, or "
            f"cluster.tp_across_nodes=true where NVLink spans nodes"
        )
    validate(config, job.world_size)
    _check_data_path(config.data.path)
    return job


def _count_gpus() -> int:
    from megavit.parallel.cpu_backend import run_on_cpu

    if run_on_cpu():
        return 0
    import torch

    return torch.cuda.device_count()


def _largest_divisor(ranks: int, at_most: int) -> int:
    return next(size for size in range(min(ranks, at_most), 0, -1) if ranks % size == 0)


def _check_data_path(path: str | None) -> None:
    """Check that a path could exist on some machine; only the nodes can check whether it exists."""
    if path is None:
        return
    if path != path.strip():
        raise ConfigError(f"data.path={path!r} begins or ends with a space")
    if path.startswith("~"):
        raise ConfigError(f"data.path={path}: ~ is not expanded here; give the full path")
    if not is_url(path):
        return
    from fsspec import available_protocols

    scheme, _, rest = bare(path).partition("://")
    if scheme not in available_protocols():
        raise ConfigError(
            f"data.path={path}: {scheme}:// is not supported; known: {', '.join(sorted(available_protocols()))}"
        )
    if not rest:
        raise ConfigError(f"data.path={path} names nothing after {scheme}://")
