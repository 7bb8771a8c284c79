"""The test bed itself: a real Slurm that runs, signals and requeues jobs as a cluster's does."""

import time

import pytest

COMMON = "#!/bin/bash\n#SBATCH --open-mode=append --requeue --output={folder}/job.log\n"

# The scontrol is part of the job that it ends: nothing can be trusted to run behind it.
REQUEUES_ITSELF = """
echo "start ${SLURM_RESTART_COUNT-first}"
[ -n "$SLURM_RESTART_COUNT" ] || scontrol requeue "$SLURM_JOB_ID"
"""

ON_TWO_NODES = """
#SBATCH --nodes=2 --ntasks-per-node=2
srun bash -c '
    trap "kill \\$!; echo rank $SLURM_PROCID on $SLURMD_NODENAME got the signal; exit 75" USR1
    touch {folder}/$SLURM_PROCID
    # The signal may kill the sleep before it reaches the shell, which then waits for its own signal.
    for _ in 1 2 3; do sleep 20 & wait; done'
echo "srun returned $?"
"""


def submit(slurm, folder, script: str) -> str:
    (folder / "job.sh").write_text((COMMON + script.lstrip("\n")).replace("{folder}", str(folder)))
    submitted = slurm.run("sbatch", "--parsable", f"--chdir={folder}", str(folder / "job.sh"))
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def wait_for(what, *, timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def wait_for_end(slurm, number: str) -> None:
    wait_for(lambda: slurm.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
    assert slurm.job(number)["JobState"] == "COMPLETED"


def lines(folder) -> list[str]:
    return (folder / "job.log").read_text().splitlines()


@pytest.mark.slow
def test_a_job_that_requeues_itself_runs_again_as_restart_1_and_appends_to_its_log(slurm, tmp_path):
    number = submit(slurm, tmp_path, REQUEUES_ITSELF)
    wait_for_end(slurm, number)
    assert [line for line in lines(tmp_path) if line.startswith("start")] == ["start first", "start 1"]
    assert slurm.job(number)["Restarts"] == "1"


def test_a_signal_reaches_the_ranks_of_both_nodes_and_their_code_comes_back(slurm, tmp_path):
    number = submit(slurm, tmp_path, ON_TWO_NODES)
    wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in range(4)))
    assert slurm.run("scancel", "--signal=USR1", number).returncode == 0
    wait_for_end(slurm, number)
    first, second = slurm.nodes
    assert sorted(line for line in lines(tmp_path) if line.startswith("rank")) == [
        f"rank 0 on {first} got the signal",
        f"rank 1 on {first} got the signal",
        f"rank 2 on {second} got the signal",
        f"rank 3 on {second} got the signal",
    ]
    assert lines(tmp_path)[-1] == "srun returned 75"


def test_what_cannot_run_is_refused_with_a_reason(slurm, tmp_path):
    for arguments, reason in (
        (["--partition=nosuch"], "Invalid partition name specified"),
        (["--account=nosuch"], "Invalid account or account/partition combination specified"),
        (["--nodes=3"], "Requested node configuration is not available"),
    ):
        refused = slurm.run("sbatch", "--test-only", *arguments, "--wrap=true")
        assert refused.returncode == 1
        assert reason in refused.stderr
