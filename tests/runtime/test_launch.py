"""Start a run as users do: exit codes, one error message, no rank left running."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL

QUICK = [*SMALL, "train.steps=3", "train.global_batch=16"]


def run(*command: str, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "MEGAVIT_DEVICE": "cpu", **environment},
    )


def assert_one_message(result: subprocess.CompletedProcess, text: str) -> None:
    assert "Traceback" not in result.stderr
    assert result.stderr.count("megavit: ") == 1, result.stderr
    assert text in result.stderr


def exit_record(run_dir) -> dict:
    return json.loads((run_dir / "exit.json").read_text())


def test_megavit_train_starts_the_ranks_and_leaves_a_run_folder(tmp_path, figure):
    # A name that torch's launcher, YAML and Hydra's grammar would each read otherwise.
    run_dir = tmp_path / "1_0 $$ $local_rank ü,(1)=#"
    command = ["-m", "megavit", "train", "run.ranks=2", "parallel.tp=2", *QUICK, f"run.dir={run_dir}"]
    command[command.index("metrics.tensorboard=false")] = "metrics.tensorboard=true"
    started = time.monotonic()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    figure(f"megavit train, two ranks: start, three steps, evaluation and save in {time.monotonic() - started:.1f} s")
    assert result.stdout.count("complete: step 3 of 3; validation top-1") == 1
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.yaml", "train.log", "metrics.jsonl", "tensorboard", "pictures", "checkpoints", "exit.json",
    }  # fmt: skip
    assert (run_dir / "pictures" / "curves.png").stat().st_size > 1000
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000003"
    assert exit_record(run_dir) == {"code": 0, "error": None}
    assert {path.name for path in (run_dir / "logs").iterdir()} == {"rank_00000.log", "rank_00001.log"}
    assert "rank 1 of 2, process " in (run_dir / "logs" / "rank_00001.log").read_text()
    (start,) = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert start["step"] == 0
    assert start["versions"].keys() >= {"megavit", "torch", "megatron-core"}
    assert "TP 2" in start["layout"]
    assert "parallel.tp=2" in start["command"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "split", "consumed_samples", "loss", "lr", "grad_norm", "images_per_s"} <= rows[0].keys()

    # Started again, a complete run trains no step.
    (again, _) = run_ranks(ranks.train_and_keep, 2, command[command.index("parallel.tp=2") :])
    assert again["code"] == 0
    assert again["due"] == []
    assert again["losses"] == {row["step"]: row["loss"] for row in rows if row["split"] == "train"}

    # The folder's checkpoint is of another model: one rank rejects it with code 2, and the checkpoint stays.
    other = run(*command, "model.num_layers=2")
    assert other.returncode == 2
    assert_one_message(other, "is of another model or run: model.num_layers was 4 and is 2")
    assert exit_record(run_dir)["code"] == 2
    for rank in (0, 1):
        # Printed once on the console, and written by each rank to its own log.
        assert (run_dir / "logs" / f"rank_{rank:05d}.log").read_text().count("is of another model or run") == 1
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000003"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "model.hiden_size=3"], "did you mean model.hidden_size"),
        (["train", "run.ranks=3", "parallel.tp=2"], "world size 3 is not a multiple"),
        (["trian"], "the command trian does not exist; did you mean train?"),
        (["train", "run.dir=/proc/megavit", *QUICK], "run.dir=/proc/megavit cannot be written"),
    ],
)
def test_wrong_input_leaves_with_2_and_one_message(arguments, message, tmp_path):
    result = run("-m", "megavit", *arguments, timeout_s=30)
    assert result.returncode == 2
    assert_one_message(result, message)


@pytest.mark.slow
def test_stop_at_exits_with_75_on_every_rank_and_the_next_start_continues(tmp_path):
    command = ["-m", "megavit", "train", *QUICK, "run.ranks=2", f"run.dir={tmp_path}"]
    stopped = run(*command, "train.stop_at=2")
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped after step 2 of 3, saved; run again to continue" in stopped.stdout
    assert exit_record(tmp_path)["code"] == 75
    assert (tmp_path / "pictures" / "curves.png").exists()
    again = run(*command, "train.stop_at=2")
    assert again.returncode == 2
    assert_one_message(again, "train.stop_at=2 is not after step 2")
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "at step 2 of 3" in result.stdout
    assert exit_record(tmp_path)["code"] == 0


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]


def test_under_torchrun_the_same_job_runs_and_the_code_is_in_exit_json(tmp_path):
    job = ["-m", "megavit.train", *QUICK, "parallel.pp=2", f"run.dir={tmp_path / 'run'}"]
    result = run(*TORCHRUN, *job)
    assert result.returncode == 0, result.stderr
    assert exit_record(tmp_path / "run") == {"code": 0, "error": None}
    one_rank = ["1" if word == "2" else word for word in TORCHRUN]
    wrong = [*QUICK, f"run.dir={tmp_path / 'run'}", "train.global_batch=10", "train.micro_batch=4"]
    result = run(*one_rank, "-m", "megavit.train", *wrong)
    assert result.returncode == 1  # torchrun's own code, whatever a worker's was
    # torchrun prints a traceback about the failed worker; megavit prints the one line.
    assert result.stderr.count("megavit: ") == 1
    assert "train.global_batch=10 is not a multiple" in result.stderr
    assert exit_record(tmp_path / "run")["code"] == 2


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        pytest.param("config", 2, "megavit: data.path of rank 1 is bad", marks=pytest.mark.slow),
        ("fault", 1, "RuntimeError: rank 1 is broken"),
        pytest.param("killed", 1, "megavit: rank 1 was ended by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_an_error_on_one_rank_ends_all_ranks_with_that_error(kind, code, message):
    script = (
        "from megavit.runtime.workers import start_ranks; import sys;"
        f"sys.exit(start_ranks(['{kind}'], ranks=2, module='tests.runtime.failing_rank'))"
    )
    started = time.monotonic()
    result = run("-c", script, timeout_s=90)
    assert result.returncode == code, result.stderr
    assert time.monotonic() - started < 60
    assert result.stderr.count(message) == 1, result.stderr
    if kind == "config":
        assert "Traceback" not in result.stderr
