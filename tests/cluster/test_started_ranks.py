import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

# Ends a test whose ranks hang, and measures nothing: at a load of 45 on two cores a rank imports torch for 38 s.
HANGS_S = 240


def start_ranks(folder: Path, *settings: str) -> list[subprocess.Popen]:
    """Two ranks of a training, as Azure ML starts them."""
    return start_processes("megavit.train", f"run.dir={folder}/run", "parallel.tp=2", *settings)


def start_processes(module: str, *arguments: str) -> list[subprocess.Popen]:
    """Two ranks, each by itself, with no torchrun."""
    port = str(free_port())
    world = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for(processes: list[subprocess.Popen]) -> str:
    """What all of them have said, when all have left."""
    try:
        return "".join(process.communicate(timeout=HANGS_S)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()


def test_ranks_without_torchrun_refuse_a_setting_in_one_message(tmp_path):
    ranks = start_ranks(tmp_path, "train.global_batch=65", "train.micro_batch=2")
    said = wait_for(ranks)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said.count("train.global_batch=65 is not a multiple") == 1
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


@pytest.mark.parametrize("late", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_rank_that_comes_late_to_a_wrong_setting_does_not_report_it_again(late):
    ranks = start_processes("tests.runtime.failing_rank", "late", late)
    said = wait_for(ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said.count("a setting is wrong") == 1, said


@pytest.mark.slow
def test_ranks_without_torchrun_save_when_they_are_told_to_stop(tmp_path):
    ranks = start_ranks(tmp_path, "train.steps=100000", "metrics.log_every=1")
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if line.startswith("step 2 "):
            break
    for rank in ranks:
        rank.terminate()
    said = wait_for(ranks)
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


# Put into a rank, not into the torchrun that starts it: it comes to its settings seconds after the other.
LATE = """
import sys, time
if "megavit.runtime.torchrun" not in sys.orig_argv:
    time.sleep(4)
"""


def start_nodes(folder: Path, *settings: str, late: bool = False) -> list[subprocess.Popen]:
    """Two pods with one rank each, with the variables that Kubeflow sets in them; the second may be late."""
    port = str(free_port())
    if late:
        (folder / "sitecustomize.py").write_text(LATE)
    kubeflow = {
        "PYTHONUNBUFFERED": "1",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": port,
        # The Training Operator sets these too.
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "MEGAVIT_MAX_RESTARTS": "3",
    }
    words = [
        "-m",
        "megavit.runtime.torchrun",
        "-m",
        "megavit.train",
        f"run.dir={folder}/run",
        "parallel.tp=2",
        *settings,
    ]
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={
                **os.environ,
                **kubeflow,
                **({"PYTHONPATH": str(folder)} if late and node == 1 else {}),
                "PET_NODE_RANK": str(node),
                "RANK": str(node),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]


@pytest.mark.slow
def test_two_pods_refuse_a_setting_in_one_message_and_are_not_started_again(tmp_path):
    nodes = start_nodes(tmp_path, "train.global_batch=65", "train.micro_batch=2", late=True)
    said = wait_for(nodes)
    assert [node.returncode for node in nodes] == [2, 2]
    assert said.count("train.global_batch=65 is not a multiple") == 1


@pytest.mark.slow
def test_two_pods_save_when_one_of_them_is_told_to_stop_and_are_started_again(tmp_path):
    nodes = start_nodes(tmp_path, "train.steps=100000", "metrics.log_every=1")
    assert nodes[0].stdout is not None
    for line in nodes[0].stdout:
        if line.startswith("step 2 "):
            break
    nodes[1].send_signal(signal.SIGTERM)
    said = wait_for(nodes)
    assert [node.returncode for node in nodes] == [203, 203], said
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
