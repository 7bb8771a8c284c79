"""`megavit submit` at the desk: what is refused, what is printed, what is kept, and that all are submitted or none."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megavit.cli.main import run
from megavit.cluster.azureml_config import AzureMLConfig
from megavit.cluster.config import SlurmConfig
from megavit.cluster.job import plan_job
from megavit.cluster.kubernetes_config import KubernetesConfig
from megavit.cluster.registry import get_backend
from megavit.config.search_path import choices
from megavit.config.sweep import split_sweep
from megavit.errors import ConfigError
from tests.cluster.stage import Stage
from tests.reference import SMALL

CPU = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_rank=1"]
QUICK = ["train.steps=2", "optim.warmup_steps=0", "train.global_batch=16", "train.eval_every=null"]


def submit(arguments: list[str]) -> int:
    return run(["submit", *arguments])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Return fake commands of Slurm, whose effects can be set."""
    stage = Stage(tmp_path / "stage", "sbatch", "scontrol", "scancel", "sinfo")
    monkeypatch.setenv("PATH", stage.environment["PATH"])
    acts, calls = tmp_path / "stage/acts.json", tmp_path / "stage/calls.jsonl"

    def played(**does: str) -> None:
        acts.write_text(json.dumps(does))

    def called() -> list[list[str]]:
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    played.called = called
    return played


# Command lines, and the one line of error.
REFUSED = {
    "cluster=slurn": "cluster=slurn does not exist; did you mean cluster=slurm?",
    "cluster=slurm cluster.partiton=a": "did you mean cluster.partition?",
    "cluster=slurm cluster.nodes=zwei": "cluster.nodes",
    "cluster=slurm cluster.nodes=0": "cluster.nodes=0 must be a finite number at least 1",
    "cluster=slurm cluster=local": "a job goes to one cluster",
    "cluster=mine.yaml": "cluster=mine.yaml cannot be read: No such file or directory",
    "cluster=slurm cluster.nodes=2 parallel.tp=4 parallel.pp=8": "16 is not a multiple of",
    "cluster=slurm cluster.nodes=3 cluster.gpus_per_node=4 parallel.tp=6": "does not fit into nodes of 4 ranks",
    "cluster=slurm cluster.nodes=3 recipe=nemo_vit_b16 data.path=/d": "train.global_batch=4096 is not a multiple of",
    "cluster=slurm cluster.ranks_per_node=4": "a GPU runs one rank",
    "cluster=slurm cluster.gpus_per_node=null": "set the number of GPUs of a node",
    "cluster=slurm run.ranks=8": "run.ranks=8 is a setting of megavit train",
    "cluster=slurm cluster.image=a.sqsh": "cluster.container=none and cluster.image=a.sqsh contradict each other",
    "cluster=slurm cluster.mounts=[/a:/b]": "cluster.mounts would be ignored without a container",
    "cluster=slurm cluster.time=tomorrow": "cluster.time='tomorrow' is not a value that Slurm accepts; for example "
    "90 (minutes), 12:00:00 (hours), 2-12:00:00 (days-hours)",
    "cluster=slurm cluster.options.signal=USR2@10": "the script sets it itself; set cluster.grace_s",
    "cluster=slurm cluster.options.array=1-4": "--multirun submits several jobs",
    "cluster=slurm cluster.nodes=1,2": "gives several values; --multirun sweeps the run's settings",
    "cluster=local cluster.nodes=2": "cluster=local is this machine",
    "cluster=slurm recipe=nemo_vit_b16": "data.source=folder needs data.path=FOLDER",
    'cluster=slurm data.path="~/in1k" train.steps=1': "~ is not expanded here",
    "cluster=slurm data=tar data.path=s4://bucket/in1k train.steps=1": "s4:// is not supported",
    "cluster=slurm optim.lr=1e-3,2e-3": "gives several values, and a run takes one",
    "--multirun cluster=slurm": "--multirun needs a setting with several values",
    "--multirun cluster=slurm optim.lr=1e-3,2e-3 run.dir=x": "run.dir=x would be the folder of every job",
    "--multirun cluster=slurm cluster.gpus_per_node=0 run.dir=x run.name=a,b": "would share the folder",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_wrong_request_is_refused_at_the_desk(typed, slurm, tmp_path):
    with pytest.raises(ConfigError) as error:
        submit(typed.split(" "))
    assert REFUSED[typed].replace("have not", "ha")[:12] in str(error.value) or REFUSED[typed] in str(error.value)
    assert not slurm.called()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (SlurmConfig(gpus_per_node=0, time="12 hours"), "90 (minutes), 12:00:00 (hours), 2-12:00:00 (days-hours)"),
        (AzureMLConfig(compute="c", data="in1k"), "azureml://datastores/NAME/paths/FOLDER or azureml:NAME:VERSION"),
        (KubernetesConfig(image="a", memory="500 GB"), "500Gi"),
    ],
    ids=["Slurm", "Azure ML", "Kubernetes"],
)
def test_a_word_that_a_cluster_would_misread_is_refused_with_an_example(config, shown):
    with pytest.raises(ConfigError) as error:
        config.check()
    assert str(error.value).endswith(f"; for example {shown}")


def test_python_launch_submit_is_megavit_submit(tmp_path):
    script = Path(__file__).parents[2] / "launch" / "submit.py"
    done = subprocess.run(
        [sys.executable, str(script), *CPU, "cluster.dry_run=true"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "srun --kill-on-bad-exit=1" in done.stdout
    wrong = subprocess.run([sys.executable, str(script), "cluster=x"], capture_output=True, text=True, cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_a_dry_run_prints_and_does_nothing(slurm, tmp_path, capsys):
    assert submit([*CPU, "cluster.dry_run=true"]) == 0
    assert "#SBATCH --nodes=1" in capsys.readouterr().out
    assert not slurm.called()
    assert not (tmp_path / "runs").exists()


def test_a_job_is_tried_out_kept_and_handed_over(slurm, tmp_path, capsys):
    slurm(sbatch='case "$1" in --parsable) echo 77;; esac')
    assert submit([*CPU, "parallel.tp=2", "run.name=mine"]) == 0
    kept = tmp_path / "runs/mine/launch/job.sbatch"
    assert slurm.called() == [["scontrol", "ping"], ["sbatch", "--test-only"], ["sbatch", "--parsable", str(kept)]]
    printed = capsys.readouterr().out
    for output in ("mine on 2 CPU ranks", str(kept), "77", "slurm-77.log", "tail -F", "scancel 77"):
        assert output in printed
    assert "parallel.tp=2" in kept.read_text()


def test_a_partition_that_is_not_there_is_told_with_those_that_are(slurm, tmp_path):
    slurm(sbatch="echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1", sinfo="echo gpu; echo debug")
    with pytest.raises(ConfigError, match=r"invalid partition specified: gpus \(partitions here: gpu, debug; set"):
        submit([*CPU, "cluster.partition=gpus"])
    assert not (tmp_path / "runs").exists()


def test_a_controller_that_does_not_answer_is_reported_before_any_file_is_written(slurm, tmp_path):
    slurm(scontrol="echo 'Slurmctld(primary) at vm is DOWN'; exit 1")
    with pytest.raises(ConfigError, match=r"controller does not answer.*is DOWN.*nothing was submitted"):
        submit(CPU)
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_the_way_out_is_a_dry_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch is not installed on this machine.*cluster\.dry_run=true"):
        submit(CPU)


def test_of_several_jobs_all_are_submitted_or_none(slurm, tmp_path):
    sweep = ["--multirun", *CPU, "optim.lr=1e-3,2e-3,3e-3"]
    # The third is wrong: none is even tried.
    with pytest.raises(ConfigError, match=r"optim\.min_lr"):
        submit([*sweep[:-1], "optim.min_lr=1e-3", "optim.lr=3e-3,2e-3,1e-4"])
    assert not slurm.called()
    # The third is not taken: the first two are taken back.
    count = tmp_path / "count"
    slurm(
        sbatch=f'[ "$1" = --parsable ] || exit 0; echo x >> {count}; n=$(wc -l < {count}); '
        "[ $n -lt 3 ] || { echo 'sbatch: error: too many' >&2; exit 1; }; echo $((70 + n))"
    )
    with pytest.raises(ConfigError, match="too many"):
        submit(sweep)
    assert [call for call in slurm.called() if call[0] == "scancel"] == [["scancel", "71"], ["scancel", "72"]]


def test_each_combination_of_a_sweep_is_a_run_with_a_name():
    runs = split_sweep(["recipe=digits", "optim.lr=1e-3,3e-3", "run.seed=range(0,2)", "data.mean=[0.5]"])
    assert [run[-1] for run in runs] == [
        f"run.name=digits-lr_{lr}-seed_{seed}" for lr in ("0.001", "0.003") for seed in (0, 1)
    ]
    assert all("data.mean=[0.5]" in run for run in runs)
    assert split_sweep(["run.name=a,b"]) == [["run.name=a"], ["run.name=b"]]


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_renders_for_slurm_and_for_this_machine(recipe):
    own = [] if recipe.startswith("digits") else ["data.path=/data"]
    backends = [get_backend([f"cluster={cluster}", "cluster.gpus_per_node=8"]) for cluster in ("slurm", "local")]
    job = plan_job([f"recipe={recipe}", *own], backends[0].config)
    assert (job.world_size, job.device) == (8, "cuda")
    for backend in backends:
        assert f"recipe={recipe}\n" in backend.render(job)


def test_a_cluster_of_ones_own_is_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "kind: slurm\ngpus_per_node: 4\npartition: gpu\nenv: {NCCL_SOCKET_IFNAME: ib0}\n"
    )
    config = get_backend(["cluster=mine.yaml", "cluster.nodes=3"]).config
    assert (config.nodes, config.gpus_per_node, config.partition, config.env) == (
        3,
        4,
        "gpu",
        {"NCCL_SOCKET_IFNAME": "ib0"},
    )


def test_cluster_is_not_a_setting_of_megavit_train(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megavit", "train", "cluster=slurm"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (
        2,
        "megavit: cluster=slurm says where a job runs, which is read by megavit submit alone\n",
    )


def submit_here(folder: Path, *settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megavit", "submit", *SMALL, *QUICK, *settings]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_local_job_leaves_with_the_runs_code(tmp_path):
    done = submit_here(tmp_path, "train.stop_at=1")
    assert done.returncode == 75, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/digits/exit.json").read_text())["code"] == 75


@pytest.mark.slow
def test_a_local_job_with_a_wrong_setting_leaves_with_2(tmp_path):
    wrong = submit_here(tmp_path, "data.path=/nowhere")
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_jobs_of_the_clusters_page_can_be_written_down(tmp_path, capsys):
    clone = Path(__file__).parents[2]
    # Azure ML builds the image from the clone that is the current folder.
    (tmp_path / "docker").symlink_to(clone / "docker")
    text = (clone / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    jobs = re.findall(r"^megavit submit (.*?)(?:#.*)?$", text, re.M)
    assert len(jobs) >= 5
    for job in jobs:
        assert submit([*shlex.split(job), "cluster.dry_run=true"]) == 0, job
    assert capsys.readouterr().out.count("not submitted") == len(jobs) + 1
