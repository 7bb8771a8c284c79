"""Define the settings of `cluster`, which say where a job runs; each kind of cluster has its own keys."""

import re
from dataclasses import dataclass, field
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number


class Kind(Enum):
    """The kinds of cluster."""

    local = "local"
    slurm = "slurm"
    azureml = "azureml"
    kubernetes = "kubernetes"


class Container(Enum):
    """How Slurm runs an image: not at all, with NVIDIA's pyxis and enroot, or with Apptainer."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class ClusterConfig:
    """Settings of every kind of cluster.

    Attributes:
        kind: the kind of cluster.
        dry_run: print the job's file and do not submit it.
        nodes: number of machines.
        gpus_per_node: GPUs of the job on each machine; 0 computes on the CPU; null, only with kind=local, takes all
            existing ones.
        ranks_per_node: processes on each machine; null: one per GPU, or without GPUs the fewest that the layout needs.
        tp_across_nodes: whether a tensor-parallel group may span several nodes, which is fast only with NVLink across
            nodes.
        python: the interpreter with megavit; null takes this one, or `python` in a container.
        env: environment of the job, cluster.env.NCCL_SOCKET_IFNAME=eth0 for example; nothing secret.
    """

    kind: Kind = Kind.local
    dry_run: bool = False
    nodes: int = 1
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    tp_across_nodes: bool = False
    python: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ConfigError if the settings contradict each other."""
        require_number("cluster", self, "nodes", "ranks_per_node", at_least=1)
        require_number("cluster", self, "gpus_per_node", at_least=0)
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"cluster.env: {name!r} is not a name of an environment variable")
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"cluster.ranks_per_node={self.ranks_per_node} and cluster.gpus_per_node={self.gpus_per_node}: a GPU "
                f"runs one rank; remove cluster.ranks_per_node, or set cluster.gpus_per_node={self.ranks_per_node}"
            )


def require_form(config: ClusterConfig, forms: dict[str, tuple[str, str]], *, taker: str) -> None:
    """Check that values have the form that a cluster accepts; accept null.

    Args:
        config: settings of the cluster.
        forms: by key a regular expression for each word of the value, and matching examples for the message.
        taker: name of the cluster, for the message.

    Raises:
        ConfigError: if a word does not match; names the setting, the word and an example.
    """
    for key, (form, example) in forms.items():
        value = getattr(config, key)
        for word in value if isinstance(value, list) else [value]:
            if word is not None and not re.fullmatch(form, word):
                raise ConfigError(f"cluster.{key}={word!r} is not a value that {taker} accepts; for example {example}")


@dataclass
class LocalConfig(ClusterConfig):
    """Settings of a job on this machine.

    See `ClusterConfig`.
    """

    def check(self) -> None:
        """Raise ConfigError if the settings contradict each other."""
        super().check()
        if self.nodes != 1:
            raise ConfigError(
                f"cluster.nodes={self.nodes}: cluster=local is this machine; set cluster.nodes=1, or use cluster=slurm"
            )


@dataclass
class SlurmConfig(ClusterConfig):
    """Settings of a Slurm cluster; `launch/slurm.sh.j2` is the script.

    Attributes:
        partition: the partition; null takes the cluster's default.
        account: the account that is charged; null takes the user's default.
        qos: quality of service; null takes the cluster's default.
        constraint: features that the nodes must have, a100|h100 for example; null for none.
        reservation: the reservation that the job uses; null for none.
        nodelist: nodes that the job must get, node[1-4] for example; null for any.
        exclude: nodes that the job must not get; null for none.
        time: time limit in Slurm's form: minutes, HH:MM:SS or D-HH:MM:SS; null takes the partition's.
        gpu_type: type of GPU, for --gpus-per-node=TYPE:N; null for any.
        cpus_per_rank: cores of a rank, including its loader's workers.
        mem: memory of a node, 500G for example; 0 takes all of it; null takes the cluster's default.
        exclusive: whether the nodes are reserved for the job.
        options: other options of sbatch, cluster.options.mail-type=END for example; null for one without a value.
        modules: modules that `module load` loads before the start.
        container: program that runs `image`.
        image: for pyxis a .sqsh file or REGISTRY#NAME:TAG, for Apptainer a .sif file or docker://NAME:TAG.
        mounts: SOURCE:TARGET[:ro]; the folder of submission is always mounted, at the same path.
        grace_s: seconds before the time limit at which the job is signalled to save and stop.
        requeue: whether a stopped or crashed job is queued again.
        max_restarts: crashes in a row, without a new checkpoint between them, after which the job is not queued again.
        port: port of the rendezvous on the first node; null derives it from the job's number.
        array: submit the runs of a sweep (--multirun) as one job array.
        array_limit: number of an array's runs that train at the same time; null for no limit.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    time: str | None = None
    gpu_type: str | None = None
    cpus_per_rank: int = 8
    mem: str | None = None
    exclusive: bool = False
    options: dict[str, str | None] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    container: Container = Container.none
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    grace_s: int = 300
    requeue: bool = True
    max_restarts: int = 3
    port: int | None = None
    array: bool = False
    array_limit: int | None = None

    def check(self) -> None:
        """Raise ConfigError if the settings contradict each other."""
        super().check()
        require_number("cluster", self, "cpus_per_rank", at_least=1)
        require_number("cluster", self, "grace_s", "max_restarts", at_least=0)
        # Slurm stores it in 16 bits.
        require_number("cluster", self, "grace_s", at_least=0, below=65536)
        require_number("cluster", self, "port", at_least=1024, below=65536)
        require_number("cluster", self, "array_limit", at_least=1)
        if self.array_limit is not None and not self.array:
            raise ConfigError(f"cluster.array_limit={self.array_limit} would be ignored without cluster.array=true")
        # Slurm parses these words: a comma, a quote or a space would have a meaning.
        require_form(self, _SLURM_WORDS, taker="Slurm")
        for name, value in self.options.items():
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ConfigError(f"cluster.options: {name!r} is not a long option of sbatch, such as mail-type")
            if name in _OUR_OPTIONS:
                raise ConfigError(f"cluster.options.{name}={value}: the script sets it itself; {_OUR_OPTIONS[name]}")
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,\s]+:/[^:,\s]*(:ro)?", mount):
                raise ConfigError(f"cluster.mounts: {mount!r} is not SOURCE:/TARGET or SOURCE:/TARGET:ro")
        if (self.container is Container.none) != (self.image is None):
            raise ConfigError(
                f"cluster.container={self.container.value} and cluster.image={self.image or 'null'} contradict each "
                f"other: set both, cluster.container to pyxis or apptainer, or neither"
            )
        if self.mounts and self.container is Container.none:
            raise ConfigError("cluster.mounts would be ignored without a container; set cluster.container and image")


# Options of sbatch that other keys set, and these keys.
_OUR_OPTIONS = {
    **{
        name: f"set cluster.{name}" for name in ("partition", "account", "qos", "constraint", "reservation", "nodelist")
    },
    **{name: f"set cluster.{name}" for name in ("exclude", "time", "mem", "nodes", "exclusive", "requeue")},
    "no-requeue": "set cluster.requeue=false",
    "signal": "set cluster.grace_s",
    "job-name": "set run.name",
    "output": "it is RUN/launch/slurm-JOB.log",
    "open-mode": "it appends",
    "ntasks-per-node": "it is 1, a torchrun on each node",
    "cpus-per-task": "set cluster.cpus_per_rank",
    "gpus-per-node": "set cluster.gpus_per_node",
    "array": "--multirun submits several jobs, with cluster.array=true as one array",
}
_WORD, _HOSTS = r"[\w.+-]+", r"[\w.,\[\]-]+"
_SLURM_WORDS = {
    "partition": (r"[\w.,+-]+", "gpu, or gpu,long"),
    "account": (_WORD, "my_project"),
    "qos": (_WORD, "high"),
    "constraint": (r"[\w.,&|*!()\[\]+-]+", "a100, or a100|h100"),
    "reservation": (r"[\w.,+-]+", "maintenance"),
    "nodelist": (_HOSTS, "node[1-4],node7"),
    "exclude": (_HOSTS, "node[1-4],node7"),
    "time": (r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}", "90 (minutes), 12:00:00 (hours), 2-12:00:00 (days-hours)"),
    "gpu_type": (_WORD, "a100"),
    "mem": (r"\d+[KMGT]?", "500G"),
}
