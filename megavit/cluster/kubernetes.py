"""Submit a job to Kubeflow, with one pod per node and torchrun in each (`cluster=kubernetes`)."""

import hashlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from megavit.cluster.backend import Submitted
from megavit.cluster.config import ClusterConfig
from megavit.cluster.job import Job
from megavit.cluster.kubernetes_config import Api, KubernetesConfig
from megavit.cluster.paths import RUNS, local_init_from, own_data_path, with_settings
from megavit.cluster.render import render_yaml
from megavit.errors import ConfigError

# Time limit in seconds for a command of kubectl, which itself retries longer if the API server does not answer.
_PATIENCE_S = 60
# A pod's name is NAME-node-0-INDEX-xxxxx, and a label may have at most 63 letters.
_NAME_LENGTH = 40
_REFUSED = "nothing was submitted: Kubernetes rejects the job"
_STILL_THERE = "the job still exists: Kubernetes does not delete it"
_RESOURCES = {Api.trainjob: "trainjob.trainer.kubeflow.org", Api.pytorchjob: "pytorchjob.kubeflow.org"}


class Kubernetes:
    """The backend for a Kubernetes cluster with Kubeflow Trainer, or with its Training Operator."""

    config_class: ClassVar[type[ClusterConfig]] = KubernetesConfig
    file_name: ClassVar[str] = "job.yaml"

    def __init__(self, config: ClusterConfig) -> None:
        assert isinstance(config, KubernetesConfig)
        self.config: ClusterConfig = config
        self._kubernetes = config

    def render(self, job: Job) -> str:
        """Render the manifest.

        Raises:
            ConfigError: if the container cannot access the job's files.
        """
        kubernetes = self._kubernetes
        words = [kubernetes.python or "python", "-m", "megavit.runtime.torchrun", "-m", "megavit.train"]
        return render_yaml(
            "kubernetes.yaml.j2",
            {
                "api": kubernetes.api.value,
                "name": job_name(job.name),
                "run": job.name,
                "namespace": kubernetes.namespace,
                "labels": kubernetes.labels,
                "runtime": kubernetes.runtime,
                "image": kubernetes.image,
                "command": [_literal(word) for word in words],
                "settings": [_literal(text) for text in with_settings(job, self._places(job))],
                "nodes": job.nodes,
                "ranks": job.ranks_per_node,
                "env": self._environment(job),
                "resources": self._resources(job),
                "grace_s": kubernetes.grace_s,
                "max_restarts": kubernetes.max_restarts,
                "service_account": kubernetes.service_account,
                "image_pull_secrets": [{"name": name} for name in kubernetes.image_pull_secrets],
                "node_selector": kubernetes.node_selector,
                "tolerations": [_toleration(text) for text in kubernetes.tolerations],
                "user": kubernetes.user,
                **self._volumes(),
            },
        )

    def _places(self, job: Job) -> dict[str, str]:
        """Return the settings that name folders, with the paths inside the container."""
        runs = self._kubernetes.runs.rstrip("/")
        changed = {"run.dir": f"{runs}/{job.name}"}
        self._require_volume("run.dir", changed["run.dir"], setting="cluster.runs", writable=True)
        if (path := own_data_path(job)) is not None:
            self._require_volume("data.path", path, setting="data.path")
        if (weight_source := local_init_from(job)) is not None:
            before, place = weight_source
            if place.startswith(RUNS):
                place = f"{runs}/{place.removeprefix(RUNS)}"
            self._require_volume("init_from", place, setting="init_from")
            changed["init_from"] = before + place
        return changed

    def _require_volume(self, key: str, path: str, *, setting: str, writable: bool = False) -> None:
        full = PurePosixPath(path)
        if not full.is_absolute() or ".." in full.parts:
            raise ConfigError(f"{key}={path} is a path on this machine; give an absolute path in the pod")
        within = [mount for mount in self._kubernetes.volumes if full.is_relative_to(mount.split(":")[1])]
        if not within:
            raise ConfigError(
                f"{key}={path} is on no volume, so the pod would not find it, or would lose it; add "
                f"cluster.volumes=[CLAIM:{full.parent}], or change {setting}"
            )
        nearest = max(within, key=lambda mount: len(mount.split(":")[1]))
        if writable and nearest.endswith(":ro"):
            raise ConfigError(f"{key}={path} is on the volume {nearest}, which is read-only; change {setting}")

    def _environment(self, job: Job) -> list[dict[str, Any]]:
        kubernetes = self._kubernetes
        variables = {
            "MEGAVIT_DEVICE": job.device,
            "MEGAVIT_MAX_RESTARTS": str(kubernetes.max_restarts),
            # A rank with a GPU computes on it; the loader's workers are separate processes.
            "OMP_NUM_THREADS": "1" if job.gpus_per_node else str(kubernetes.cpus_per_rank),
            # The user's id may have no name and no home directory in the image.
            "HOME": "/tmp",
            "USER": "megavit",
            **kubernetes.env,
        }
        secret = {
            name: {"secretKeyRef": dict(zip(("name", "key"), place.split("/"), strict=True))}
            for name, place in kubernetes.secrets.items()
        }
        return [
            *({"name": name, "value": _literal(value)} for name, value in variables.items() if name not in secret),
            *({"name": name, "valueFrom": source} for name, source in secret.items()),
        ]

    def _resources(self, job: Job) -> dict[str, dict[str, str]]:
        kubernetes = self._kubernetes
        requests = {"cpu": str(job.ranks_per_node * kubernetes.cpus_per_rank)}
        limits = {}
        if kubernetes.memory:
            requests["memory"] = limits["memory"] = kubernetes.memory
        if job.gpus_per_node:
            # Request and limit must be equal for GPUs.
            requests[kubernetes.gpu_resource] = limits[kubernetes.gpu_resource] = str(job.gpus_per_node)
        return {"requests": requests, **({"limits": limits} if limits else {})}

    def _volumes(self) -> dict[str, list[dict[str, Any]]]:
        shared = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self._kubernetes.shm_size}}
        volumes: list[dict[str, Any]] = [shared]
        mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
        names: dict[str, str] = {}
        for text in self._kubernetes.volumes:
            claim, path, *mode = text.split(":")
            if claim not in names:
                names[claim] = f"volume-{len(names)}"
                volumes.append({"name": names[claim], "persistentVolumeClaim": {"claimName": claim}})
            mounts.append({"name": names[claim], "mountPath": path, **({"readOnly": True} if mode else {})})
        return {"volumes": volumes, "mounts": mounts}

    def try_out(self, texts: list[str]) -> None:
        """Check every manifest with the API server.

        Raises:
            ConfigError: if it rejects one, with its message.
        """
        if shutil.which("kubectl") is None:
            raise ConfigError(
                "cluster=kubernetes: kubectl is not installed on this machine; install it, or set cluster.dry_run=true "
                "to see the manifest"
            )
        for text in texts:
            self._ask("create", "--dry-run=server", "--filename=-", stdin=text)

    def submit(self, file: Path, job: Job) -> Submitted:
        """Create the job.

        Raises:
            ConfigError: if Kubernetes rejects the job, with kubectl's message.
        """
        self._ask("create", f"--filename={file}")
        name, resource = job_name(job.name), _RESOURCES[self._kubernetes.api]
        kubectl = shlex.join(self._kubectl())
        label = {Api.trainjob: "jobset.sigs.k8s.io/jobset-name", Api.pytorchjob: "training.kubeflow.org/job-name"}
        pods = f"--selector={label[self._kubernetes.api]}={name}"
        return Submitted(
            name,
            {
                "job": name,
                "runs": f"{self._kubernetes.runs.rstrip('/')}/{job.name}, in the pods",
                "follow": f"{kubectl} get pods {pods}; {kubectl} logs --follow --prefix {pods}",
                "stop": f"{kubectl} delete {resource} {name}; it saves first, and continues when submitted again",
            },
        )

    def take_back(self, submitted: Submitted) -> None:
        """Delete the job."""
        self._ask("delete", _RESOURCES[self._kubernetes.api], submitted.job_id, "--wait=false", failed=_STILL_THERE)

    def _kubectl(self) -> list[str]:
        named = {"context": self._kubernetes.context, "namespace": self._kubernetes.namespace}
        return ["kubectl", *(f"--{key}={value}" for key, value in named.items() if value is not None)]

    def _ask(self, *words: str, stdin: str | None = None, failed: str = _REFUSED) -> str:
        """Run kubectl and return its output."""
        command = [*self._kubectl(), "--request-timeout=30s", *words]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"kubectl did not answer in {_PATIENCE_S} s; `kubectl get {_RESOURCES[self._kubernetes.api]}` shows "
                f"whether this machine reaches the cluster, and whether the job exists"
            ) from error
        if done.returncode:
            # kubectl prints its attempts, one per line, before the line with the reason.
            lines = [line for line in done.stderr.splitlines() if line and not re.match(r"[EWI]\d{4} ", line)]
            said = " ".join(lines) or f"kubectl exited with {done.returncode}"
            raise ConfigError(f"{failed}: {said}{self._way_out(said)}")
        return done.stdout

    def _way_out(self, said: str) -> str:
        if "no matches for kind" in said:
            other = next(api.value for api in Api if api is not self._kubernetes.api)
            return f" (it is not installed in this cluster; try cluster.api={other})"
        if "already exists" in said:
            return f" (delete it first: kubectl delete {_RESOURCES[self._kubernetes.api]} NAME; or choose a run.name)"
        if "refused" in said or "no such host" in said or "Unable to connect" in said:
            return " (`kubectl config current-context` shows the cluster in use; cluster.context chooses another)"
        return ""


def job_name(run: str) -> str:
    """Return a run's name in Kubernetes' form (lower-case letters, digits, hyphens), different for different runs."""
    variables = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    variables = variables if re.match("[a-z]", variables) else f"run-{variables}".strip("-")
    if variables == run and len(variables) <= _NAME_LENGTH:
        return variables
    return f"{variables[: _NAME_LENGTH - 7].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


def _literal(word: str) -> str:
    """Escape a word so that Kubernetes, which expands $(NAME) in commands and environments, does not change it."""
    return word.replace("$", "$$")


def _toleration(text: str) -> dict[str, str]:
    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    how = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **how, **({"effect": effect} if effect else {})}
