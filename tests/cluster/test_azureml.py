import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megavit.cluster.azureml_config import AzureMLConfig
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

BASE = ("cluster=azureml", "cluster.compute=a100", "cluster.environment=registry.azurecr.io/megavit:1.0")
DATA = "cluster.data=azureml://datastores/images/paths/imagenet"
FULL = (
    *BASE,
    DATA,
    "cluster.nodes=4",
    "cluster.timeout_s=86400",
    "cluster.tags={team:vision}",
    "cluster.identity=managed",
    "cluster.env.NCCL_SOCKET_IFNAME=eth0",
)
RUN = ("recipe=mae_l16_finetune", "data.path=train", "init_from=ema:runs/mae_l16_1600ep", "train.micro_batch=32")


@pytest.fixture(scope="module")
def digits_job():
    return planned(*BASE)[1]


def argv(command: str, folder: Path) -> list[str]:
    """What Python is given where Azure ML has put its paths in and bash has run the command."""
    mounted = command.replace("${{inputs.data}}", "/mnt/INPUT_data").replace("${{outputs.runs}}", "/mnt/OUTPUT_runs")
    stub = folder / "python"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/root"}
    done = subprocess.run(
        ["bash", "-c", mounted], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert os.listdir(folder) == ["python"]
    return json.loads(done.stdout)


def load_job():
    """Azure ML's own reader of job files."""
    return pytest.importorskip("azure.ai.ml", reason="pip install azure-ai-ml: it knows what Azure ML takes").load_job


def test_the_job_is_the_golden_one():
    assert rendered(*FULL, *RUN) == (GOLDEN / "azureml.yaml").read_text()


def test_the_dockerfile_of_a_clone_is_built_where_no_environment_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} has none; run this in a clone")):
        rendered(*BASE[:2])
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "Dockerfile").write_text("FROM scratch\n")
    text = rendered(*BASE[:2])
    assert parsed(text)["environment"] == {"build": {"path": str(tmp_path), "dockerfile_path": "docker/Dockerfile"}}
    (tmp_path / "job.yaml").write_text(text)
    assert load_job()(tmp_path / "job.yaml")._validate().passed


@pytest.mark.parametrize(
    "arguments",
    [
        (*FULL, *RUN),
        (*BASE, "cluster.environment=azureml:megavit@latest"),
        ("cluster=azureml", "cluster.instance_type=Standard_ND96asr_v4", "cluster.environment=azureml:megavit:3"),
        (*BASE, "cluster.identity=user_identity"),
    ],
)
def test_azures_client_takes_the_job(arguments, tmp_path):
    given = dict(word.split("=", 1) for word in arguments)
    (tmp_path / "job.yaml").write_text(rendered(*(f"{key}={value}" for key, value in given.items())))
    result = load_job()(tmp_path / "job.yaml")._validate()
    assert result.passed, result.error_messages


def test_azures_client_refuses_a_wrong_field(tmp_path):
    read = load_job()
    for right, wrong in (("instance_count", "instance_cuont"), ("type: pytorch", "type: pytorhc"), ("path:", "paht:")):
        text = rendered(*FULL, *RUN)
        assert right in text
        (tmp_path / "job.yaml").write_text(text.replace(right, wrong))
        with pytest.raises(Exception, match="Validation for"):
            read(tmp_path / "job.yaml")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_each_task_renders(recipe, tmp_path):
    data = [DATA, "data.path=."] if RECIPES[recipe] else []
    job = parsed(rendered(*BASE, f"recipe={recipe}", *data))
    path = ["data.path=/mnt/INPUT_data"] if data else []
    # Quoted for Hydra, as ${{…}} is when it is typed.
    seen = [re.sub(r'="([\w/.-]+)"$', r"=\1", word) for word in argv(job["command"], tmp_path)]
    assert seen == ["-m", "megavit.train", f"recipe={recipe}", f"run.dir=/mnt/OUTPUT_runs/{recipe}", *path]
    assert ("inputs" in job) == bool(data)


def test_any_value_of_any_setting_of_the_run_is_one_word(digits_job, tmp_path):
    settings = [
        typed(key, EVIL) for key in flatten(ExperimentConfig()) if key not in ("run.dir", "data.path", "init_from")
    ]
    job = parsed(get_backend(BASE).render(dataclasses.replace(digits_job, overrides=settings)))
    assert argv(job["command"], tmp_path) == ["-m", "megavit.train", *settings, 'run.dir="/mnt/OUTPUT_runs/digits"']


def test_a_runs_name_and_its_paths_are_words(tmp_path):
    name = EVIL.replace("/", "")
    given = [typed("run.name", name), typed("data.path", EVIL), "data=folder", "recipe=digits"]
    job = parsed(rendered(*BASE, DATA, *given, typed("init_from", f"runs/{EVIL}")))
    assert argv(job["command"], tmp_path)[2:] == [
        given[0],
        "data=folder",
        "recipe=digits",
        typed("run.dir", f"/mnt/OUTPUT_runs/{name}"),
        typed("data.path", f"/mnt/INPUT_data/{EVIL}"),
        typed("init_from", f"/mnt/OUTPUT_runs/{EVIL}"),
    ]
    assert job["display_name"] == name


@pytest.mark.parametrize("key", ["run.name", "data.path", "init_from", "optim.lr", "metrics.wandb"])
def test_what_azure_would_replace_is_refused(key, digits_job):
    with pytest.raises(ConfigError):
        rendered(*BASE, typed(key, "${{inputs.x}}"))
    replaced = dataclasses.replace(digits_job, overrides=[typed(key, "${{inputs.x}}")])
    with pytest.raises(ConfigError, match="which Azure ML would replace by another value"):
        get_backend(BASE).render(replaced)


@pytest.mark.parametrize("key", sorted(set(flatten(AzureMLConfig())) - {"kind"}))
def test_a_setting_of_the_cluster_is_a_value_or_refused(key, digits_job, tmp_path):
    plain = parsed(get_backend(BASE).render(digits_job))
    for value in EVILS:
        given = [word for word in BASE if not word.startswith(f"cluster.{key}=")]
        try:
            job = parsed(get_backend([*given, setting_of(AzureMLConfig, key, value)]).render(digits_job))
        except ConfigError:
            continue
        # Only these take any text; a compute of another kind is no word of the command.
        assert key in ("python", "env", "tags") and "${{" not in value
        if key == "python":
            words = subprocess.run(
                ["bash", "-c", job["command"].replace("exec", "printf '%s\\0' exec")], capture_output=True, text=True
            )
            assert words.stdout.split("\0")[:3] == ["exec", value, "-m"]
        else:
            section = job["tags"] if key == "tags" else job["environment_variables"]
            assert section.pop("KEY") == value
            if key == "tags":
                assert job.pop("tags") == {}
        assert key_paths(job) == key_paths(plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=folder", "data.path=/home/me/images"], "set cluster.data to the data's place"),
        ([DATA, "data=folder", "data.path=/home/me/images"], "data.path to a path in it"),
        ([DATA, "data=folder", "data.path=../images"], "data.path to a path in it"),
        ([DATA], "would be ignored: data.source=digits"),
        (["init_from=/home/me/runs/mae"], "copy it into cluster.runs="),
        (["init_from=runs/../../mae"], "copy it into cluster.runs="),
        (["cluster.instance_type=Standard_ND96asr_v4"], "only one of them"),
        (["cluster.env.RANK=0"], "is set by Azure ML"),
        (['cluster.runs="azureml://datastores/a/paths/b?sig=abc"'], "is not a value that Azure ML accepts"),
    ],
)
def test_what_azure_could_not_run_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        rendered(*BASE, "recipe=digits", *arguments)
