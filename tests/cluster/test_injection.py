"""No setting can be more than a value in what a shell runs, and no secret is written down."""

import re
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from megavit.cli.main import run
from megavit.cluster import job
from megavit.cluster.config import ClusterConfig, LocalConfig, SlurmConfig
from megavit.cluster.job import plan_job
from megavit.cluster.registry import get_backend
from megavit.cluster.render import refuse_secrets
from megavit.config.experiment import ExperimentConfig
from megavit.config.settings import flatten
from megavit.errors import ConfigError
from tests.cluster.stage import Stage

NASTY = [
    "; touch CAUGHT",
    "$(touch CAUGHT)",
    "`touch CAUGHT`",
    "a\ntouch CAUGHT",
    "'; touch CAUGHT; '",
    '"; touch CAUGHT; "',
    "a # b && touch CAUGHT",
    "\\\ntouch CAUGHT\\",
    "${IFS}touch${IFS}CAUGHT | *",
]
CLUSTERS = [
    ["cluster=local"],
    ["cluster=slurm", "cluster.gpus_per_node=0"],
    ["cluster=kubernetes", "cluster.gpus_per_node=0", "cluster.image=a", "cluster.volumes=[runs:/runs]"],
    ["cluster=azureml", "cluster.gpus_per_node=0", "cluster.compute=a"],
]
SCONTROL = 'case "$*" in *hostnames*) echo node1;; *) echo "JobId=41 JobState=RUNNING";; esac'
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node1"}
PLAIN = {"kind": "slurm", "gpus_per_node": 0, "container": "pyxis", "image": "a.sqsh"}


def submit(arguments: list[str]) -> int:
    return run(["submit", *arguments])


def cluster_file(folder: Path, values: dict) -> str:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(values))
    return f"cluster={file}"


def places(config: type[ClusterConfig], nasty: str) -> list[dict]:
    """The nasty value in each key that takes words."""
    found = []
    for part in fields(config):
        if part.name == "kind":
            continue
        text = str(part.type)
        if "dict" in text:
            found += [{part.name: {"KEY": nasty}}, {part.name: {nasty: "value"}}]
        elif "list" in text:
            found.append({part.name: [nasty]})
        else:
            found.append({part.name: nasty})
    return found


@pytest.mark.parametrize("nasty", NASTY)
def test_no_key_of_a_cluster_lets_a_command_through(nasty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = Stage(tmp_path / "stage", "srun", "scontrol", "module", "python")
    # The run's settings are the same for each key of the cluster.
    composed = job.compose([])
    monkeypatch.setattr(job, "compose", lambda overrides: composed)
    scripts = []
    for config, plain in ((SlurmConfig, PLAIN), (LocalConfig, {"kind": "local"})):
        base = get_backend([cluster_file(tmp_path, plain)])
        directives = len(re.findall("^#SBATCH", base.render(plan_job([], base.config)), re.M))
        for values in places(config, nasty):
            try:
                backend = get_backend([cluster_file(tmp_path, {**plain, **values})])
                text = backend.render(plan_job([], backend.config))
            except ConfigError:
                continue
            # Even a directive of Slurm's more than there was, or one that is two words, would be too much.
            found = re.findall("^#SBATCH (.*)$", text, re.M)
            assert len(found) - directives in (0, 1), values
            assert all(len(shlex.split(line)) == 1 for line in found), values
            if config is SlurmConfig:
                scripts.append(text)
            else:
                # A command that is not there, or a Python that is a played one, so that nothing is trained here.
                scripts.append(text.replace(sys.executable, "srun"))
    together = "\n".join(f"(\n{text}\n)" for text in scripts)
    played = stage.play(together, folder=tmp_path, environment=JOB, srun="exit 0", scontrol=SCONTROL)
    # All but the one whose Python is not there.
    assert len(played.of("srun")) >= len(scripts) - 1
    assert not list(tmp_path.rglob("CAUGHT*"))
    # A line break is a control character, and ${ } is OmegaConf's.
    assert len(scripts) > 0 or "\n" in nasty or "${" in nasty


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_every_setting_of_a_run_arrives_as_the_word_that_was_typed(cluster, tmp_path, monkeypatch):
    folder = tmp_path / "a b;touch CAUGHT$(touch CAUGHT)'\""
    folder.mkdir()
    monkeypatch.chdir(folder)
    stage = Stage(tmp_path / "stage", "srun", "scontrol", "python")
    backend = get_backend(
        [f"cluster={cluster}", f"cluster.python={tmp_path}/stage/bin/python"]
        + (["cluster.gpus_per_node=0"] if cluster == "slurm" else [])
    )
    typed = [f"{key}={nasty}" for key in flatten(ExperimentConfig()) for nasty in NASTY]
    text = backend.render(replace(plan_job([], backend.config), overrides=typed))
    played = stage.play(text, folder=tmp_path, environment=JOB, srun="exit 0", scontrol=SCONTROL)
    (words,) = played.of("srun" if cluster == "slurm" else "python")
    assert words[words.index("megavit.train") + 1 :] == typed
    assert not list(tmp_path.rglob("CAUGHT"))


def test_a_line_break_in_a_setting_is_refused():
    backend = get_backend(["cluster=local"])
    with pytest.raises(ConfigError, match="line break"):
        plan_job(['run.name="a\nb"'], backend.config)


def test_a_secret_of_the_environment_is_not_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-and-long")
    with pytest.raises(ConfigError, match=r"\$MY_API_KEY") as error:
        submit(["cluster=local", "cluster.dry_run=true", "metrics.wandb=s3cr3t-and-long"])
    assert "s3cr3t" not in str(error.value) + capsys.readouterr().out
    # Longer than any file's name, as web tokens are.
    monkeypatch.setenv("MY_API_KEY", "s3cr3t" * 800)
    with pytest.raises(ConfigError, match=r"\$MY_API_KEY") as error:
        submit(["cluster=local", "cluster.dry_run=true", f"metrics.wandb={'s3cr3t' * 800}"])
    assert "s3cr3t" not in str(error.value) + capsys.readouterr().out
    # A file that holds one is no secret itself.
    monkeypatch.setenv("MY_CREDENTIALS", str(tmp_path / "key.json"))
    (tmp_path / "key.json").touch()
    submit(["cluster=local", "cluster.dry_run=true", f"cluster.env.WHERE={tmp_path / 'key.json'}"])
    # Quoted for a shell or for YAML it is another text.
    monkeypatch.setenv("MY_API_KEY", "it's-a-\\-s3cr3t")
    for cluster in CLUSTERS:
        with pytest.raises(ConfigError, match=r"\$MY_API_KEY"):
            submit([*cluster, "cluster.dry_run=true", 'metrics.wandb="it\'s-a-\\-s3cr3t"'])
    with pytest.raises(ConfigError, match=r"cluster\.env\.WANDB_API_KEY would be written"):
        submit(["cluster=local", "cluster.dry_run=true", "cluster.env.WANDB_API_KEY=abc"])
    assert not (tmp_path / "runs").exists()
    # Names that only sound like it.
    submit(["cluster=local", "cluster.dry_run=true", "cluster.env.TOKENIZERS_PARALLELISM=false"])


@pytest.mark.parametrize(
    "url", ["https://me:pass@host/a.tar", "https://host/a.tar?sv=1&sig=abc", "s3://b/a.tar?X-Amz-Signature=ab"]
)
def test_a_url_that_is_signed_is_not_written_down(url):
    with pytest.raises(ConfigError, match="in a URL"):
        refuse_secrets(f"settings=( data.path={url} )", environment={})
    refuse_secrets("settings=( data.path=https://host:8080/a@b.tar )", environment={"HOME": "/root"})
