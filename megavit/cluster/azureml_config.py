"""Define the settings of `cluster` for Azure Machine Learning."""

from dataclasses import dataclass, field

from megavit.cluster.config import ClusterConfig, Kind, require_form
from megavit.errors import ConfigError
from megavit.validation import require_number


@dataclass
class AzureMLConfig(ClusterConfig):
    """Settings of a workspace of Azure Machine Learning; `launch/azureml.yaml.j2` is the command job.

    `runs` is mounted for writing: `run.dir` becomes NAME in it, and init_from=runs/OTHER is found there. `data` is
    mounted for reading: data.path is a path in it, data.path=train for example, or data.path=. for all of it.

    Attributes:
        workspace: the workspace; null takes the one of `az configure`.
        resource_group: resource group of the workspace.
        subscription: subscription that is billed.
        compute: name of the workspace's compute cluster; null takes serverless compute of `instance_type`.
        instance_type: size of a serverless node, Standard_ND96asr_v4 for example.
        environment: an image, or azureml:NAME:VERSION, with megavit installed; null builds docker/Dockerfile in this
            folder.
        data: azureml:// path or azureml:NAME:VERSION of the data; null if the run reads no files.
        runs: azureml:// path of the folder that holds the runs; the default is in the workspace's default store.
        shm_size: size of /dev/shm, which the loader's workers and NCCL use.
        timeout_s: seconds after which Azure ends the job; null for no limit.
        experiment: experiment in which the workspace lists the job.
        tags: tags of the job.
        identity: identity that opens `data` and `runs`, managed or user_identity; null takes the datastore's.
        python: the interpreter with megavit in the environment; null takes `python`.
    """

    kind: Kind = Kind.azureml
    workspace: str | None = None
    resource_group: str | None = None
    subscription: str | None = None
    compute: str | None = None
    instance_type: str | None = None
    environment: str | None = None
    data: str | None = None
    runs: str = "azureml://datastores/workspaceblobstore/paths/megavit/runs"
    shm_size: str = "64g"
    timeout_s: int | None = None
    experiment: str = "megavit"
    tags: dict[str, str] = field(default_factory=dict)
    identity: str | None = None

    def check(self) -> None:
        """Raise ConfigError if the settings contradict each other."""
        super().check()
        require_number("cluster", self, "timeout_s", at_least=1)
        if (self.compute is None) == (self.instance_type is None):
            raise ConfigError(
                f"cluster.compute={self.compute or 'null'} and cluster.instance_type={self.instance_type or 'null'}: "
                f"set the workspace's compute cluster or, for serverless compute, the size of a node; only one of them"
            )
        require_form(self, _FORMS, taker="Azure ML")
        for name in self.env:
            if name in _AZURES or name.startswith("AZUREML_"):
                raise ConfigError(f"cluster.env.{name} is set by Azure ML, which knows the nodes; remove it")


_AZURES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NAME = r"[A-Za-z0-9][\w.-]*"
_PATH = rf"azureml://[^\s?'\"]+|azureml:{_NAME}(:{_NAME}|@latest)"
_FORMS = {
    "workspace": (_NAME, "my-workspace"),
    "resource_group": (r"\w[\w.()-]*", "my-group"),
    "subscription": (r"\w[\w -]*", "00000000-0000-0000-0000-000000000000"),
    "compute": (_NAME, "gpu-cluster"),
    "instance_type": (_NAME, "Standard_ND96asr_v4"),
    "environment": (
        rf"azureml:{_NAME}(:{_NAME}|@latest)|(?!azureml:)\w[\w./:@-]*",
        "azureml:megavit:1, azureml:megavit@latest or registry.io/megavit:1",
    ),
    "data": (_PATH, "azureml://datastores/NAME/paths/FOLDER or azureml:NAME:VERSION"),
    "runs": (r"azureml://[^\s?'\"]+", "azureml://datastores/NAME/paths/FOLDER"),
    "shm_size": (r"\d+[bkmg]", "64g"),
    "experiment": (_NAME, "megavit"),
    "identity": ("managed|user_identity", "managed or user_identity"),
}
