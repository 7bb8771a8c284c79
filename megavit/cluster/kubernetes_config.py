"""Define the settings of `cluster` for Kubernetes with Kubeflow."""

import re
from dataclasses import dataclass, field
from enum import Enum

from megavit.cluster.config import ClusterConfig, Kind, require_form
from megavit.errors import ConfigError
from megavit.validation import require_number


class Api(Enum):
    """Kubeflow's kinds of job for PyTorch: Trainer's TrainJob (2.2 or later), or the Training Operator's PyTorchJob."""

    trainjob = "trainjob"
    pytorchjob = "pytorchjob"


@dataclass
class KubernetesConfig(ClusterConfig):
    """Settings of a Kubernetes cluster; `launch/kubernetes.yaml.j2` is the manifest.

    A node is a pod. Paths are paths in the container: `run.dir` becomes `runs`/NAME, and init_from=runs/OTHER is found
    there.

    Attributes:
        api: kind of job.
        runtime: the ClusterTrainingRuntime of a TrainJob; the one of launch/kubernetes_runtime.yaml restarts a job
            according to its exit codes.
        image: container image with megavit installed.
        volumes: CLAIM:/PATH[:ro], persistent volume claims and their paths in the container.
        runs: folder in the container, on a volume, that holds the runs.
        context: context of kubectl; null takes the current one.
        namespace: namespace of the job, its volumes and secrets; null takes the context's.
        service_account: service account of the pods; null takes the namespace's default.
        secrets: SECRET/KEY by environment variable, cluster.secrets.HF_TOKEN=huggingface/token for example: the pods
            get the value from the cluster's secret, and no file contains it.
        image_pull_secrets: secrets for pulling the image.
        labels: labels of the job, such as {kueue.x-k8s.io/queue-name: research}.
        node_selector: labels of the nodes that the job may run on.
        tolerations: taints of nodes that the job tolerates, as KEY[=VALUE][:EFFECT].
        gpu_resource: resource name of a GPU.
        cpus_per_rank: cores of a rank, including its loader's workers.
        memory: memory of a pod, 500Gi for example; null requests none.
        shm_size: size of /dev/shm, which the loader's workers and NCCL use; it counts as memory.
        user: user and group id of the container; the volumes are made writable for the group.
        grace_s: seconds in which a pod can save after a request to stop.
        max_restarts: crashes in a row, without a new checkpoint between them, after which the job is not restarted.
    """

    kind: Kind = Kind.kubernetes
    api: Api = Api.trainjob
    runtime: str = "torch-distributed"
    image: str | None = None
    volumes: list[str] = field(default_factory=list)
    runs: str = "/runs"
    context: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    secrets: dict[str, str] = field(default_factory=dict)
    image_pull_secrets: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[str] = field(default_factory=list)
    gpu_resource: str = "nvidia.com/gpu"
    cpus_per_rank: int = 8
    memory: str | None = None
    shm_size: str = "16Gi"
    user: int = 1000
    grace_s: int = 300
    max_restarts: int = 3

    def check(self) -> None:
        """Raise ConfigError if the settings contradict each other."""
        super().check()
        require_number("cluster", self, "cpus_per_rank", "user", at_least=1)
        require_number("cluster", self, "grace_s", "max_restarts", at_least=0)
        if not self.image:
            raise ConfigError("cluster.image=null: set the container's image, REGISTRY/megavit:TAG for example")
        require_form(self, _FORMS, taker="Kubernetes")
        for name, place in self.secrets.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(rf"{_NAME}/[\w.-]+", place):
                raise ConfigError(f"cluster.secrets.{name}={place!r} is not VARIABLE=SECRET/KEY")
        for key in ("labels", "node_selector"):
            for name, value in getattr(self, key).items():
                if not re.fullmatch(rf"({_NAME}/)?{_LABEL}", name) or not re.fullmatch(rf"({_LABEL})?", value):
                    raise ConfigError(f"cluster.{key}: {name!r}: {value!r} is not a label of Kubernetes")
        for name in {*self.env, *self.secrets}:
            if name.startswith("PET_") or name in _OPERATORS:
                raise ConfigError(f"cluster.env.{name} is set by Kubeflow, which knows the pods; remove it")
        if twice := sorted({*self.env} & {*self.secrets}):
            raise ConfigError(f"cluster.env.{twice[0]} and cluster.secrets.{twice[0]} exclude each other; remove one")
        targets = [mount.split(":")[1] for mount in self.volumes]
        if len(set(targets)) < len(targets):
            raise ConfigError(f"cluster.volumes={self.volumes} names a path twice")
        if self.api is Api.pytorchjob and self.runtime != KubernetesConfig.runtime:
            raise ConfigError(f"cluster.runtime={self.runtime} would be ignored: a PyTorchJob has no runtime")


_OPERATORS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NAME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
_LABEL = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"
_QUANTITY = r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?"
_FORMS = {
    "runtime": (_NAME, "torch-distributed"),
    "image": (r"\w[\w./:@-]*", "registry.io/megavit:1"),
    "volumes": (rf"{_NAME}:/[^:]+(:ro)?", "runs:/runs or images:/data:ro"),
    "runs": (r"/[^:]+", "/runs"),
    "namespace": (_NAME, "research"),
    "service_account": (_NAME, "trainer"),
    "image_pull_secrets": (_NAME, "registry-key"),
    "tolerations": (
        rf"\w[\w./-]*(={_LABEL})?(:(NoSchedule|PreferNoSchedule|NoExecute))?",
        "nvidia.com/gpu:NoSchedule",
    ),
    "gpu_resource": (rf"({_NAME}/)?{_LABEL}", "nvidia.com/gpu"),
    "memory": (_QUANTITY, "500Gi"),
    "shm_size": (_QUANTITY, "16Gi"),
}
