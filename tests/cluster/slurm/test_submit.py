"""Test `megavit submit cluster=slurm` on a real Slurm: runs that finish, are signalled, crash, and are cancelled."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.cluster.slurm.conftest import Slurm
from tests.distributed import run_ranks
from tests.reference import SMALL

REPOSITORY = Path(__file__).parents[3]
TP_2 = ["cluster.ranks_per_node=2", "parallel.tp=2"]
CPU = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_rank=1"]
SOURCE = """
class Crash:
    def __init__(self, *given): raise RuntimeError("the disk is gone")
"""


class Submitting:
    """Submit jobs from a folder, and look at them.

    Attributes:
        slurm: the Slurm.
        folder: from where jobs are submitted.
    """

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "megavit", *words],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.folder,
            env={**self.slurm.environment, **environment},
        )

    def submit(self, *words: str) -> list[str]:
        """The numbers of the jobs."""
        done = self.run("submit", *CPU, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("  job ")]
        assert sorted(self.jobs()) == sorted(numbers)
        return numbers

    def jobs(self) -> list[str]:
        """All that were submitted from the folder, ended ones too; other tests may use the same Slurm now."""
        output = self.slurm.run("squeue", "--noheader", "--states=all", "--format=%i %Z")
        assert output.returncode == 0, output.stderr
        jobs = (line.split(maxsplit=1) for line in output.stdout.splitlines())
        return [number for number, folder in jobs if Path(folder) == self.folder]

    def wait(self, number: str, *states: str, timeout_s: float = 150) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while (job := self.slurm.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job['JobState']}: {self.log(number)}"
            time.sleep(0.2)
        return job

    def log(self, number: str) -> str:
        files = list(self.folder.glob(f"runs/*/launch/slurm-{number}.log"))
        return files[0].read_text() if files else ""

    def losses(self, name: str) -> dict[int, float]:
        """Return the loss of each step of a run; for a step of two starts, the later one's."""
        file = self.folder / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}

    def wait_for_step(self, name: str, step: int, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while max(self.losses(name), default=0) < step:
            assert time.monotonic() < deadline, "not in time"
            time.sleep(0.05)


@pytest.fixture
def at(slurm, tmp_path):
    submitting = Submitting(slurm, tmp_path)
    yield submitting
    if jobs := submitting.jobs():
        slurm.run("scancel", *jobs)


def test_usr1_in_mid_run_on_two_nodes_saves_requeues_and_ends_as_one_that_was_not_interrupted(at):
    settings = [*SMALL, "train.steps=60", "model.hidden_dropout=0.1"]
    (number,) = at.submit(*settings, "cluster.nodes=2", "cluster.ranks_per_node=1", "run.name=signalled")
    at.wait_for_step("signalled", 5)
    assert at.slurm.run("scancel", "--signal=USR1", number).returncode == 0
    # The tests' ranks have one thread, as cluster.cpus_per_rank gives: another number rounds differently.
    uninterrupted = run_ranks(ranks.train_and_keep, 2, [*settings, f"run.dir={at.folder}/runs/whole"])[0]["losses"]
    job = at.wait(number, "COMPLETED", "FAILED")
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "1", "2"), at.log(number)
    assert "megavit: stopped and saved; queued again" in at.log(number)
    assert "Traceback" not in at.log(number)
    assert len(at.losses("signalled")) == 60
    assert at.losses("signalled") == uninterrupted


@pytest.mark.slow
def test_a_wrong_setting_that_only_the_node_can_see_ends_the_job_once(at):
    (number,) = at.submit(*SMALL, *TP_2, "data.source=folder", "data.path=/nowhere", "run.name=wrong")
    job = at.wait(number, "COMPLETED", "FAILED")
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), at.log(number)
    assert at.log(number).count("/nowhere") == 1
    assert "Traceback" not in at.log(number)


@pytest.mark.slow
def test_a_crashing_job_stops_after_its_restarts_with_the_reason(at):
    (at.folder / "crashing.py").write_text(SOURCE)
    (number,) = at.submit(
        *SMALL,
        "data.source=crashing:Crash",
        "run.name=crash",
        "cluster.max_restarts=1",
        f"cluster.env.PYTHONPATH={at.folder}:{REPOSITORY}",
    )
    at.wait(number, "FAILED", "COMPLETED")
    job = at.slurm.job(number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "1", "1:0"), at.log(number)
    reason = "RuntimeError: the disk is gone"
    assert f"megavit: crash 1 in a row: {reason}; queued again" in at.log(number)
    assert f"crashed 2 times in a row (cluster.max_restarts=1); not queued again: {reason}" in at.log(number)


@pytest.mark.slow
def test_a_multirun_of_two_submits_both_and_both_finish(at):
    first, second = at.submit("--multirun", *SMALL, "train.steps=3", "run.seed=1,2", "run.name=sweep")
    for number, name in ((first, "sweep-seed_1"), (second, "sweep-seed_2")):
        job = at.wait(number, "COMPLETED", "FAILED")
        assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "0", "0:0"), at.log(number)
        assert "complete: step 3 of 3" in at.log(number)
        assert "Traceback" not in at.log(number)
        assert sorted(at.losses(name)) == [1, 2, 3]
    assert at.losses("sweep-seed_1") != at.losses("sweep-seed_2")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_as_one_array_trains_each_run_and_queues_a_stopped_task_again_alone(at):
    sweep = ["cluster.array=true", *SMALL, "train.steps=120", "run.seed=1,2", "run.name=swept"]
    done = at.run("submit", "--multirun", *CPU, *sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    (number,) = (line.split()[-1] for line in done.stdout.splitlines() if line.startswith("  job "))
    at.wait_for_step("swept-seed_2", 5)
    assert at.slurm.run("scancel", "--signal=USR1", f"{number}_1").returncode == 0
    for task, restarts in ((0, "0"), (1, "1")):
        log = at.folder / f"multirun/swept/launch/slurm-{number}_{task}.log"
        job = at.wait(f"{number}_{task}", "COMPLETED", "FAILED", timeout_s=300)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", restarts), log.read_text()
        assert sorted(at.losses(f"swept-seed_{task + 1}")) == list(range(1, 121))
        assert "complete: step 120 of 120" in log.read_text()


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(at):
    (number,) = at.submit(*SMALL, *TP_2, "train.steps=100000", "run.name=cancelled")
    at.wait_for_step("cancelled", 5)
    assert at.slurm.run("scancel", number).returncode == 0
    assert at.wait(number, "CANCELLED")["Restarts"] == "0"
    time.sleep(6)
    assert at.slurm.job(number)["JobState"] == "CANCELLED", at.log(number)
    assert (at.folder / "runs/cancelled/checkpoints/latest").exists(), at.log(number)


def test_what_the_cluster_would_not_take_is_refused_at_the_desk(at):
    for words, output in (
        (["cluster.partition=gpus"], "invalid partition specified: gpus"),
        (["cluster.nodes=4"], "Requested node configuration is not available"),
        (["cluster.account=nosuch"], "Invalid account or account/partition combination"),
    ):
        done = at.run("submit", *CPU, *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert output in done.stderr
        assert "nothing was submitted" in done.stderr
    assert "partitions here: test" in at.run("submit", *CPU, "cluster.partition=gpus").stderr
    conf = at.folder / "slurm.conf"
    conf.write_text(
        Path(at.slurm.environment["SLURM_CONF"]).read_text().replace("SlurmctldPort=17817", "SlurmctldPort=17999")
    )
    gone = at.run("submit", *CPU, SLURM_CONF=str(conf))
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1), gone.stderr
    assert "controller does not answer" in gone.stderr
    assert not (at.folder / "runs").exists()
    assert at.jobs() == []


@pytest.mark.slow
def test_the_time_limit_saves_and_requeues(at):
    (number,) = at.submit(*SMALL, "train.steps=100000", "run.name=limit", "cluster.time=2", "cluster.grace_s=60")
    deadline = time.monotonic() + 150
    while at.slurm.job(number)["Restarts"] == "0":
        assert time.monotonic() < deadline, at.log(number)
        time.sleep(1)
    assert "megavit: stopped and saved; queued again" in at.log(number)
