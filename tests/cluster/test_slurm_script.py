"""The batch script on a stage: its calls, and its end for each end of a run. tests/cluster/slurm/ has a real Slurm."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megavit.cli.main import main
from megavit.cluster.job import plan_job
from megavit.cluster.registry import get_backend
from megavit.errors import ConfigError
from tests.cluster.stage import Played, Stage

CPU = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_rank=1"]
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]"}
RUNNING = 'case "$*" in *hostnames*) echo node1; echo node2;; *"show job"*) echo "JobId=41 JobState=RUNNING";; esac'


def script(*arguments: str) -> str:
    own = [text for text in arguments if text.startswith("cluster")]
    backend = get_backend(own)
    return backend.render(plan_job([text for text in arguments if text not in own], backend.config))


@pytest.fixture
def play(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = Stage(tmp_path / "stage", "srun", "scontrol", "module")

    def play(
        text: str, *, flatten: str | None = None, status: int = 0, scontrol: str = RUNNING, srun: str | None = None
    ) -> Played:
        """Run the script, with an srun that leaves this exit.json and this exit code."""
        writes = f"echo '{flatten}' > runs/digits/exit.json; " if flatten is not None else ""
        srun = srun or f"{writes}exit {status}"
        return stage.play(text, folder=tmp_path, environment=JOB, srun=srun, scontrol=scontrol)

    return play


def requeues(played: Played) -> int:
    return len([call for call in played.of("scontrol") if call[0] == "requeue"])


def test_one_torchrun_on_each_node_meets_on_the_first(play):
    played = play(script(*CPU, "cluster.nodes=2", "cluster.ranks_per_node=2", "parallel.tp=2"), flatten='{"code": 0, ')
    (srun,) = played.of("srun")
    assert srun[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=2"]
    assert srun[srun.index("megavit.runtime.torchrun") :] == [
        "megavit.runtime.torchrun",
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node1:15041",
        "--rdzv-id=41",
        "-m",
        "megavit.train",
        "parallel.tp=2",
    ]
    assert played.code == 0


def test_a_finished_run_is_not_queued_again(play):
    played = play(script(*CPU), flatten='{"code": 0, "error": null}')
    assert (played.code, requeues(played)) == (0, 0)


def test_a_stopped_run_is_queued_again_although_torchrun_exits_with_1(play):
    played = play(script(*CPU), flatten='{"code": 75, "error": null}', status=1)
    assert (played.code, requeues(played)) == (75, 1)
    assert played.of("scontrol")[-1] == ["requeue", "41"]


def test_a_stopped_run_is_not_queued_again_where_that_was_not_wanted(play):
    played = play(script(*CPU, "cluster.requeue=false"), flatten='{"code": 75, "error": null}', status=1)
    assert (played.code, requeues(played)) == (75, 0)
    assert "#SBATCH --no-requeue" in script(*CPU, "cluster.requeue=false")


def test_a_cancelled_job_is_not_queued_again(play):
    cancelled = RUNNING.replace("JobState=RUNNING", "JobState=CANCELLED")
    played = play(script(*CPU), flatten='{"code": 75, "error": null}', status=1, scontrol=cancelled)
    assert (played.code, requeues(played)) == (75, 0)
    assert "the job is CANCELLED, and not queued again" in played.output


def test_a_wrong_setting_is_never_queued_again(play):
    played = play(script(*CPU), flatten='{"code": 2, "error": "megavit: wrong"}', status=1)
    assert (played.code, requeues(played)) == (2, 0)


def test_a_run_that_could_not_lock_its_folder_is_not_queued_again(play):
    played = play(script(*CPU), status=2)
    assert (played.code, requeues(played)) == (2, 0)


def test_a_crashing_job_stops_after_its_restarts_with_the_reason(play, tmp_path):
    text = script(*CPU, "cluster.max_restarts=2")
    error = json.dumps({"code": 1, "error": 'Traceback …\n  File "x.py"\nRuntimeError: the "disk" is gone\n'})
    ends = [play(text, flatten=error, status=1) for _ in range(3)]
    assert [requeues(end) for end in ends] == [1, 1, 0]
    assert [end.code for end in ends] == [1, 1, 1]
    assert "crashed 3 times in a row (cluster.max_restarts=2); not queued again: RuntimeError" in ends[2].output
    # After a new checkpoint the count starts from zero.
    (tmp_path / "runs/digits/checkpoints").mkdir()
    (tmp_path / "runs/digits/checkpoints/latest").write_text("step_00000010\n")
    assert requeues(play(text, flatten=error, status=1)) == 1


def test_ranks_that_end_without_a_message_are_a_crash_with_any_earlier_exit_code(play, tmp_path):
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/exit.json").write_text('{"code": 0, "error": null}\n')
    played = play(script(*CPU), status=137)
    assert (played.code, requeues(played)) == (1, 1)
    assert "the ranks ended without a message, srun with code 137" in played.output
    null = play(script(*CPU), flatten='{"code": null, "error": null}', status=1)
    assert (null.code, requeues(null)) == (1, 1)


def test_usr1_to_the_script_reaches_srun_and_the_run_is_waited_for(play):
    srun = """
        trap 'sleep 0.5; echo "{\\"code\\": 75, " > runs/digits/exit.json; exit 1' USR1
        kill -USR1 $PPID
        for _ in {1..50}; do sleep 0.1; done
    """
    played = play(script(*CPU), srun=srun)
    assert (played.code, requeues(played)) == (75, 1)


def test_gpus_and_words_of_slurms_are_asked_for():
    text = script(
        "cluster=slurm",
        "cluster.nodes=4",
        "cluster.gpu_type=h100",
        "cluster.partition=gpu",
        "cluster.account=vision",
        "cluster.time=1-00:00:00",
        "cluster.exclusive=true",
        "cluster.options.mail-type=END",
        "cluster.env.NCCL_SOCKET_IFNAME=ib0",
        "recipe=nemo_vit_g14",
        "data.path=/data",
        "parallel.tp=2",
    )
    directives = re.findall(r"^#SBATCH (.*)$", text, re.M)
    for wanted in (
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--gpus-per-node=h100:8",
        "--partition=gpu",
        "--account=vision",
        "--time=1-00:00:00",
        "--exclusive",
        "--mail-type=END",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
    ):
        assert wanted in directives
    assert "export NCCL_SOCKET_IFNAME=ib0" in text
    assert "export MEGAVIT_DEVICE=cuda" in text


def test_pyxis_and_apptainer_see_the_folders_they_need(play, tmp_path):
    common = [*CPU, "cluster.mounts=[/data:/data:ro]", "data=folder", "data.path=/data/in1k", "train.steps=10"]
    pyxis = play(script(*common, "cluster.container=pyxis", "cluster.image=/img/megavit.sqsh"))
    (srun,) = pyxis.of("srun")
    assert srun[2:6] == [
        "--container-image=/img/megavit.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data:ro",
        f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
    ]
    assert srun[6:9] == ["python", "-m", "megavit.runtime.torchrun"]
    apptainer = play(script(*common, "cluster.container=apptainer", "cluster.image=/img/megavit.sif"))
    (srun,) = apptainer.of("srun")
    assert srun[2:][: srun.index("python") - 2] == [
        *("apptainer", "exec", "--bind", f"{tmp_path}:{tmp_path}", "--bind", "/data:/data:ro"),
        *("--pwd", str(tmp_path), "/img/megavit.sif"),
    ]
    weights = [*CPU, "cluster.container=pyxis", "cluster.image=a", "init_from=ema:/elsewhere/run"]
    with pytest.raises(ConfigError, match=r"init_from=/elsewhere/run is not in the container"):
        script(*weights)
    # An id of a hub is no folder.
    assert "hf:google/vit" in script(
        *weights[:-1], "init_from=hf:google/vit", "data=hub", "data.path=a/b", "train.steps=9"
    )
    with pytest.raises(ConfigError, match=r"data\.path=/data/in1k is not in the container"):
        script(*[text for text in common if "mounts" not in text], "cluster.container=pyxis", "cluster.image=a")


def test_shellcheck_finds_nothing_in_what_is_rendered(tmp_path):
    checker = shutil.which("shellcheck", path=f"{Path(shutil.sys.executable).parent}:/usr/bin")
    assert checker, "shellcheck is one of the development extras"
    for name, arguments in {
        "plain": CPU,
        "all": [
            *("cluster=slurm", "cluster.nodes=2", "parallel.tp=4", "cluster.modules=[cuda/12.4,nccl]"),
            *("cluster.container=pyxis", "cluster.image=a b.sqsh", "cluster.port=29500", 'cluster.env.A="it\'s"'),
        ],
        "local": ["cluster=local", "cluster.env.A=x y", "data.mean=[0.5]"],
    }.items():
        file = tmp_path / f"{name}.sh"
        file.write_text(script(*arguments))
        found = subprocess.run([checker, str(file)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


ARRAY = ["optim.lr=1e-3,3e-3", "run.seed=0,1", "train.steps=5"]


def array_script(tmp_path, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.chdir(tmp_path)
    words = ["submit", "-m", *CPU, "cluster.array=true", "cluster.dry_run=true", *arguments]
    assert main(words) == 0
    return capsys.readouterr().out


def test_a_sweep_as_one_array_has_a_task_for_each_run_and_its_own_folder(tmp_path, monkeypatch, capsys):
    text = array_script(tmp_path, monkeypatch, capsys, "cluster.array_limit=2", *ARRAY)
    assert text.startswith(f"# {tmp_path}/multirun/digits/launch/job.sbatch: an array of 4 runs, each digits on 1 CPU")
    golden = Path(__file__).parent / "golden" / "array.sbatch"
    script = text.partition("\n")[2].replace(str(tmp_path), "/folder").replace(sys.executable, "python")
    assert script.strip() == golden.read_text().strip()


def test_an_arrays_task_trains_its_run_and_queues_itself_again_alone(tmp_path, monkeypatch, capsys):
    text = array_script(tmp_path, monkeypatch, capsys, *ARRAY)
    stage = Stage(tmp_path / "stage", "srun", "scontrol", "module")
    task = {**JOB, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}
    run = "runs/digits-lr_0.003-seed_1"
    srun = f'echo \'{{"code": 75, "error": null}}\' > {run}/exit.json; exit 1'
    played = stage.play(text, folder=tmp_path, environment=task, srun=srun, scontrol=RUNNING)
    assert played.of("srun")[0][-4:] == ["optim.lr=0.003", "run.seed=1", "train.steps=5", f"run.name={Path(run).name}"]
    assert (played.code, played.of("scontrol")[-1]) == (75, ["requeue", "40_3"])
    none = stage.play(text, folder=tmp_path, environment={**task, "SLURM_ARRAY_TASK_ID": "4"}, scontrol=RUNNING)
    assert (none.code, none.of("srun")) == (2, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cluster.array=true optim.lr=1e-3", "cluster.array=true is for the runs of a sweep; add --multirun"),
        ("-m cluster.array_limit=2 optim.lr=1e-3,2e-3", "cluster.array_limit=2 would be ignored without cluster.array"),
        ("-m cluster.array=true parallel.tp=1,2", "the tasks of an array have the same resources"),
    ],
)
def test_an_array_that_cannot_be_is_refused(line, message, capsys):
    assert main(["submit", *CPU, *line.split()]) == 2
    assert message in capsys.readouterr().err
