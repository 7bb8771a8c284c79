import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavit.cluster.kubernetes import job_name
from megavit.cluster.kubernetes_config import KubernetesConfig
from megavit.cluster.registry import get_backend
from megavit.config.experiment import ExperimentConfig
from megavit.config.settings import flatten
from megavit.errors import ConfigError
from tests.cluster.manifest import (
    EVIL,
    EVILS,
    GOLDEN,
    RECIPES,
    key_paths,
    parsed,
    planned,
    rendered,
    setting_of,
    typed,
)

BASE = (
    "cluster=kubernetes",
    "cluster.image=registry.example.com/megavit:1.0",
    "cluster.volumes=[datasets:/data:ro,megavit-runs:/runs]",
)
FULL = (
    *BASE,
    "cluster.nodes=4",
    "cluster.namespace=vision",
    "cluster.service_account=trainer",
    "cluster.secrets.WANDB_API_KEY=wandb/api-key",
    "cluster.image_pull_secrets=[registry]",
    "cluster.labels={kueue.x-k8s.io/queue-name:research}",
    "cluster.node_selector={nvidia.com/gpu.product:NVIDIA-H100-80GB-HBM3}",
    'cluster.tolerations=["nvidia.com/gpu=present:NoSchedule",spot]',
    "cluster.memory=500Gi",
    "cluster.env.NCCL_SOCKET_IFNAME=eth0",
)
RUN = ("recipe=mae_l16_finetune", "data.path=/data/imagenet", "init_from=runs/mae_l16_1600ep", "train.micro_batch=32")
APIS = ("trainjob", "pytorchjob")


@pytest.fixture(scope="module")
def digits_job():
    return planned(*BASE)[1]


def container(manifest: dict) -> dict:
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        return spec["trainer"]
    (found,) = spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    return found


def expand(word: str, environment: dict[str, str]) -> str:
    """As Kubernetes does: $$ is a dollar, $(NAME) the variable where there is one."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), word)


def as_the_library_writes_it(manifest: dict) -> dict:
    """The manifest read into the classes of Kubeflow's client, and written again: what they do not know is gone."""
    if manifest["kind"] != "PyTorchJob":
        models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
        return getattr(models, f"TrainerV1alpha1{manifest['kind']}").from_dict(manifest).to_dict()
    training = pytest.importorskip("kubeflow.training.api_client", reason="pip install kubeflow-training")
    client = training.ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), "KubeflowOrgV1PyTorchJob")
    return client.sanitize_for_serialization(read)


@pytest.mark.parametrize("api", APIS)
def test_the_manifest_is_the_golden_one(api):
    text = rendered(*FULL, f"cluster.api={api}", *RUN)
    assert text == (GOLDEN / f"{api}.yaml").read_text()


@pytest.mark.parametrize("api", APIS)
def test_kubeflows_client_knows_every_field(api):
    manifest = parsed(rendered(*FULL, f"cluster.api={api}", *RUN))
    assert as_the_library_writes_it(manifest) == manifest
    typo = json.loads(json.dumps(manifest).replace('"readOnly"', '"readonly"'))
    assert typo != manifest and as_the_library_writes_it(typo) != typo


def test_kubeflows_client_knows_every_field_of_the_runtime():
    manifest = parsed((Path(__file__).parents[2] / "launch" / "kubernetes_runtime.yaml").read_text())
    assert as_the_library_writes_it(manifest) == manifest


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_each_task_renders(recipe):
    path = ["data.path=/data/images"] if RECIPES[recipe] else []
    _, job = planned(*BASE, f"recipe={recipe}", *path)
    for api in APIS:
        backend = get_backend([*BASE, f"cluster.api={api}"])
        pod = container(parsed(backend.render(job)))
        assert pod["args"] == [f"recipe={recipe}", *path, f"run.dir=/runs/{recipe}"]
        assert pod["command"] == ["python", "-m", "megavit.runtime.torchrun", "-m", "megavit.train"]


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_node_is_a_pod(nodes):
    given = (*BASE, f"cluster.nodes={nodes}", "train.global_batch=384", "train.micro_batch=4")
    train_job = parsed(rendered(*given))["spec"]["trainer"]
    assert (train_job["numNodes"], train_job["numProcPerNode"]) == (nodes, 8)
    assert train_job["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    pytorch_job = parsed(rendered(*given, "cluster.api=pytorchjob"))["spec"]
    assert pytorch_job["nprocPerNode"] == "8"
    assert sum(replica["replicas"] for replica in pytorch_job["pytorchReplicaSpecs"].values()) == nodes
    templates = [replica["template"] for replica in pytorch_job["pytorchReplicaSpecs"].values()]
    assert all(template == templates[0] for template in templates)


@pytest.mark.parametrize("api", APIS)
def test_any_value_of_any_setting_of_the_run_is_one_word(api):
    backend, job = planned(*BASE, f"cluster.api={api}")
    settings = [
        typed(key, EVIL) for key in flatten(ExperimentConfig()) if key not in ("run.dir", "data.path", "init_from")
    ]
    manifest = parsed(backend.render(dataclasses.replace(job, overrides=settings)))
    seen = container(manifest)["args"]
    environment = {variable["name"]: variable.get("value", "") for variable in container(manifest)["env"]}
    assert [expand(word, environment) for word in seen] == [*settings, "run.dir=/runs/digits"]


@pytest.mark.parametrize("api", APIS)
def test_a_runs_name_and_its_paths_are_words(api):
    given = [
        typed("run.name", EVIL.replace("/", "")),
        typed("data.path", f"/data/{EVIL}"),
        "data=folder",
        "recipe=digits",
    ]
    manifest = parsed(rendered(*BASE, f"cluster.api={api}", *given))
    *typed_words, last = (expand(word, {"HOME": "/tmp"}) for word in container(manifest)["args"])
    assert typed_words == given
    assert last == typed("run.dir", f"/runs/{EVIL}")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])


@pytest.mark.parametrize("key", sorted(set(flatten(KubernetesConfig())) - {"kind", "context"}))
def test_a_setting_of_the_cluster_is_a_value_or_refused(key, digits_job):
    plain = parsed(get_backend(BASE).render(digits_job))
    for value in [*EVILS, "plain"]:
        try:
            backend = get_backend([*BASE, setting_of(KubernetesConfig, key, value)])
            manifest = parsed(backend.render(digits_job))
        except ConfigError:
            assert value != "plain" or key not in ("python", "env", "namespace")
            continue
        if value == "plain":
            continue
        # Only these two take any text.
        assert key in ("python", "env")
        if key == "env":
            variable = {"name": "KEY", "value": value.replace("$", "$$")}
            assert variable in container(manifest)["env"]
            container(manifest)["env"].remove(variable)
        else:
            assert expand(container(manifest)["command"][0], {"HOME": "/tmp"}) == value
        assert key_paths(manifest) == key_paths(plain)


def test_a_secret_is_named_and_not_written(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "b1946ac92492d2347c6235b4d2611184")
    text = rendered(*FULL, *RUN)
    assert "b1946ac9" not in text
    reference = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}}
    assert reference in container(parsed(text))["env"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster.volumes=[]"], "run.dir=/runs/digits is on no volume"),
        (["cluster.volumes=[runs:/runs:ro]"], "read-only"),
        (["recipe=digits", "data=folder", "data.path=/home/me/images"], "data.path=/home/me/images is on no volume"),
        (["recipe=digits", "data=folder", "data.path=images"], "is a path on this machine"),
        (["init_from=elsewhere/mae"], "is a path on this machine"),
        (["recipe=digits", "data=folder", 'data.path="/data/../etc"'], "is a path on this machine"),
        (["cluster.image=null"], "set the container's image"),
        (["cluster.env.PET_NNODES=3"], "is set by Kubeflow"),
        (["cluster.api=pytorchjob", "cluster.runtime=megavit"], "would be ignored"),
        (["cluster.secrets.HF_TOKEN=hf_abcdefghijk"], "SECRET/KEY"),
        (["cluster.volumes=[a:/runs,b:/runs]"], "names a path twice"),
    ],
)
def test_what_no_pod_could_run_is_refused(arguments, message):
    keys = {argument.partition("=")[0] for argument in arguments}
    with pytest.raises(ConfigError, match=re.escape(message)):
        rendered(*(word for word in BASE if word.partition("=")[0] not in keys), *arguments)


def test_the_folder_of_submission_is_not_the_pods():
    manifest = parsed(rendered(*BASE, "run.dir=/home/me/runs/x", "run.name=x"))
    assert container(manifest)["args"] == ["run.name=x", "run.dir=/runs/x"]


def test_different_runs_have_different_names():
    names = ["digits", "Digits", "digits_", "9", "a" * 50, "a" * 51, "mae_b16-lr_0.1", "mae_b16-lr_0_1", "-", "é"]
    assert len({job_name(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{,38}[a-z0-9])?", job_name(name)) for name in names)
    assert job_name("digits") == "digits"
