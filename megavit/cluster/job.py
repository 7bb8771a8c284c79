"""Plan a run as a job, and check it before submission against the requested nodes."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megavit.cluster.config import ClusterConfig, Kind
from megavit.config.compose import AUTO_MODEL, compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import key_of, sweep, write_home_out, write_text
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


def split_sweep(overrides: list[str]) -> list[list[str]]:
    """Return a list of settings for each combination of values (key=a,b); each run gets a name of its own.

    Raises:
        ConfigError: if no setting has several values, a value is repeated, or the runs would share one folder.
    """
    choices, swept = [], []
    for text in overrides:
        values = sweep(text, run_types())
        if len(set(values)) < len(values):
            raise ConfigError(f"'{text}' names a value twice; each combination is one job")
        if values != [text]:
            swept.append(key_of(text))
        choices.append(values)
    if not swept:
        raise ConfigError("--multirun needs a setting with several values, as optim.lr=1e-3,3e-3")
    fixed = [text for text in overrides if text.startswith("run.dir=") and "run.dir" not in swept]
    if fixed and "run.name" not in swept:
        raise ConfigError(f"{fixed[0]} would be the folder of every job; leave it away, they are runs/NAME-VALUES")
    return [_named(list(combination), swept) for combination in itertools.product(*choices)]


def _named(overrides: list[str], swept: list[str]) -> list[str]:
    if "run.name" in swept or "run.dir" in swept:
        return overrides
    short = [key.rsplit(".", 1)[-1] for key in swept]
    words = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key in swept:
            last = key.rsplit(".", 1)[-1]
            safe = re.sub(r"[^\w.+-]+", ".", value).strip(".")
            words.append(f"{last if short.count(last) == 1 else key}_{safe}")
    rest = [text for text in overrides if not text.startswith("run.name=")]
    name = compose([text for text in overrides if text != AUTO_MODEL]).run.name
    return [*rest, write_text("run.name", f"{name}-{'-'.join(words)}")]


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
