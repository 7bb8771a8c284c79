"""Submit a command job to Azure ML, which starts every rank itself (`cluster=azureml`)."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from megavit.cluster.azureml_config import AzureMLConfig
from megavit.cluster.backend import Submitted
from megavit.cluster.config import ClusterConfig
from megavit.cluster.job import Job
from megavit.cluster.paths import RUNS, local_init_from, own_data_path, with_settings
from megavit.cluster.render import render_yaml
from megavit.errors import ConfigError

# Time limit in seconds for a command of az: creating a job uploads the build's folder first.
_PATIENCE_S = 600
_REFUSED = "nothing was submitted: Azure ML rejects the job"
_STILL_THERE = "the job still exists: Azure ML does not cancel it"
_DATA, _RUNS = "${{inputs.data}}", "${{outputs.runs}}"
_DOCKERFILE = "docker/Dockerfile"


class AzureML:
    """The backend for a workspace of Azure Machine Learning."""

    config_class: ClassVar[type[ClusterConfig]] = AzureMLConfig
    file_name: ClassVar[str] = "job.yaml"

    def __init__(self, config: ClusterConfig) -> None:
        assert isinstance(config, AzureMLConfig)
        self.config: ClusterConfig = config
        self._azure = config

    def render(self, job: Job) -> str:
        """Render the command job.

        Raises:
            ConfigError: if the job cannot access its files, or Azure ML would replace a value.
        """
        azure = self._azure
        typed = [*job.overrides, job.name, azure.python or "", *azure.env.values()]
        for text in [*typed, *azure.tags, *azure.tags.values()]:
            if "${{" in text:
                raise ConfigError(f"{text!r} contains ${{{{, which Azure ML would replace by another value; remove it")
        settings = with_settings(job, self._places(job))
        words = [azure.python or "python", "-m", "megavit.train", *settings]
        return render_yaml(
            "azureml.yaml.j2",
            {
                "display_name": job.name,
                "experiment": azure.experiment,
                "tags": azure.tags,
                "command": "exec " + shlex.join(words),
                "environment": self._environment(),
                "data": azure.data,
                "runs": azure.runs.rstrip("/"),
                "compute": azure.compute,
                "instance_type": azure.instance_type,
                "shm_size": azure.shm_size,
                "nodes": job.nodes,
                "ranks": job.ranks_per_node,
                "timeout_s": azure.timeout_s,
                "identity": azure.identity,
                "env": {
                    "MEGAVIT_DEVICE": job.device,
                    # Azure ML sets a rank's number on its node, but not the number of ranks on the node.
                    "LOCAL_WORLD_SIZE": str(job.ranks_per_node),
                    **({"OMP_NUM_THREADS": "1"} if job.gpus_per_node else {}),
                    **azure.env,
                },
            },
        )

    def _environment(self) -> dict[str, Any] | str:
        named = self._azure.environment
        if named is not None:
            return named if named.startswith("azureml:") else {"image": named}
        here = Path.cwd()
        if not (here / _DOCKERFILE).is_file():
            raise ConfigError(
                f"cluster.environment=null builds {_DOCKERFILE} in this folder, and {here} has none; run this in a "
                f"clone of megavit, or set cluster.environment to an image or to azureml:NAME:VERSION"
            )
        return {"build": {"path": str(here), "dockerfile_path": _DOCKERFILE}}

    def _places(self, job: Job) -> dict[str, str]:
        """Return the settings that name folders, with the paths inside the job."""
        changed = {"run.dir": f"{_RUNS}/{job.name}"}
        path = own_data_path(job)
        if path is None:
            if self._azure.data is not None:
                raise ConfigError(
                    f"cluster.data={self._azure.data} would be ignored: data.source={job.config.data.source} reads no "
                    f"files from it; set data.path to a path in it, data.path=. for all of it, or remove cluster.data"
                )
        elif self._azure.data is None or not _is_within(path):
            raise ConfigError(
                f"data.path={path} exists on no machine of Azure ML: set cluster.data to the data's place, such as "
                f"azureml://datastores/NAME/paths/FOLDER, and data.path to a path in it, data.path=. for all of it"
            )
        else:
            changed["data.path"] = _DATA if PurePosixPath(path) == PurePosixPath(".") else f"{_DATA}/{path}"
        if (weight_source := local_init_from(job)) is not None:
            before, place = weight_source
            inside = place.removeprefix(RUNS)
            if inside == place or not _is_within(inside):
                raise ConfigError(
                    f"init_from={before}{place} exists on no machine of Azure ML: copy it into cluster.runs="
                    f"{self._azure.runs} and set init_from={before}{RUNS}NAME"
                )
            changed["init_from"] = f"{before}{_RUNS}/{inside}"
        return changed

    def try_out(self, texts: list[str]) -> None:
        """Check with Azure ML that the jobs' compute exists.

        Raises:
            ConfigError: if not, with az's message; az checks a job's file only when it creates the job.
        """
        if shutil.which("az") is None:
            raise ConfigError(
                "cluster=azureml: az is not installed on this machine; install the Azure CLI and run `az extension add "
                "--name ml`, or set cluster.dry_run=true to see the job"
            )
        if self._azure.compute is not None:
            self._ask("compute", "show", "--name", self._azure.compute)
        else:
            # az takes the name as a separate option.
            workspace = self._azure.workspace
            self._ask("workspace", "show", *(["--name", workspace] if workspace else []), in_workspace=False)

    def submit(self, file: Path, job: Job) -> Submitted:
        """Create the job.

        Raises:
            ConfigError: if Azure ML rejects the job, with az's message.
        """
        created = json.loads(self._ask("job", "create", "--file", str(file)))
        name = str(created["name"])
        studio = created.get("services", {}).get("Studio", {}).get("endpoint", "the workspace's page")
        where = shlex.join(self._where())
        return Submitted(
            name,
            {
                "job": name,
                "runs": f"{self._azure.runs.rstrip('/')}/{job.name}",
                "watch": studio,
                "follow": f"az ml job stream --name {name} {where}".rstrip(),
                "stop": f"az ml job cancel --name {name} {where}".rstrip(),
            },
        )

    def take_back(self, submitted: Submitted) -> None:
        """Cancel the job."""
        self._ask("job", "cancel", "--name", submitted.job_id, failed=_STILL_THERE)

    def _where(self, *, in_workspace: bool = True) -> list[str]:
        named = {"resource-group": self._azure.resource_group, "subscription": self._azure.subscription}
        if in_workspace:
            named = {"workspace-name": self._azure.workspace, **named}
        return [word for key, value in named.items() if value is not None for word in (f"--{key}", value)]

    def _ask(self, *words: str, in_workspace: bool = True, failed: str = _REFUSED) -> str:
        """Run az and return its answer, parsed from JSON."""
        where = self._where(in_workspace=in_workspace)
        command = ["az", "ml", *words, *where, "--output", "json", "--only-show-errors"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"az did not answer in {_PATIENCE_S} s; `az account show` shows whether it works, `az ml job list` "
                f"whether the job exists"
            ) from error
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"az exited with {done.returncode}"
            raise ConfigError(f"{failed}: {said}{_way_out(said)}")
        return done.stdout


def _is_within(path: str) -> bool:
    """Return whether a relative path stays inside its first folder."""
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and not path.startswith("~")


def _way_out(said: str) -> str:
    if "az login" in said:
        return ""
    if "'ml'" in said and ("misspelled" in said or "not in" in said):
        return " (its extension is missing: az extension add --name ml)"
    if "--workspace-name" in said or "--resource-group" in said:
        return " (set cluster.workspace and cluster.resource_group)"
    return ""
