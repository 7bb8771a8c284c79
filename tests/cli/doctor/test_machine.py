"""Test the doctor's findings on the machine: the run's folder, limits, environment."""

import shutil
from pathlib import Path

import pytest

from megavit.cli.doctor.disk import check_disk
from megavit.cli.doctor.environment import check_settings, check_tools
from megavit.cli.doctor.finding import State
from megavit.parallel.host import cgroup_limits
from tests.cli.doctor.machines import only


def test_a_run_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "runs").mkdir()
    found = only(check_disk(tmp_path / "runs" / "deep" / "run"), "run folder")
    assert found.state is State.ok
    assert found.figures["free_bytes"] > 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_written_is_broken(folder, tmp_path):
    (tmp_path / "file").write_text("")
    found = only(check_disk(tmp_path / folder), "run folder")
    assert found.state is State.broken
    assert f"{tmp_path / folder} cannot be written" in found.text
    assert "run.dir=FOLDER" in found.advice
    assert (tmp_path / "file").read_text() == ""


def test_less_than_a_gibibyte_is_broken(tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(2**40, 2**40 - 2**29, 2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    found = only(check_disk(tmp_path), "run folder")
    assert found.state is State.broken
    assert "512 MiB free, less than the 1.0 GiB" in found.text
    assert only(check_disk(tmp_path), "/dev/shm").state is State.missing


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_control_groups_of_both_versions_are_read_and_the_tightest_counts(tmp_path):
    own, second, first = tmp_path / "own", tmp_path / "v2", tmp_path / "v1"
    write(own, "0::/jobs/42\n")
    write(second / "cpu.max", "max 100000\n")
    write(second / "jobs" / "cpu.max", "400000 100000\n")
    write(second / "jobs" / "42" / "cpu.max", "150000 100000\n")
    write(second / "jobs" / "memory.max", f"{2**33}\n")
    write(second / "jobs" / "42" / "memory.max", "max\n")
    assert cgroup_limits(second, own) == (1.5, 2**33)

    # In a container: its path is the host's, the group itself is mounted at the root.
    write(own, "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n")
    write(first / "memory" / "memory.limit_in_bytes", f"{2**34}\n")
    write(first / "cpu" / "cpu.cfs_quota_us", "200000\n")
    write(first / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert cgroup_limits(first, own) == (2.0, 2**34)

    write(first / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(first / "cpu" / "cpu.cfs_quota_us", "-1\n")
    assert cgroup_limits(first, own) == (None, None)
    assert cgroup_limits(first, tmp_path / "nothing") == (None, None)


def test_the_environment_is_shown_by_a_list_and_no_secret_with_it():
    environment = {
        "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x",
        "NCCL_AUTH_TOKEN": "hush1", "WANDB_API_KEY": "hush2", "FAKE_TOKEN": "hush3", "HOME": "/home/hush4",
    }  # fmt: skip
    findings = check_settings(environment)
    assert "hush" not in str(findings)
    shown = only(findings, "environment").figures
    assert shown == {
        "NCCL_AUTH_TOKEN": "set, not shown",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "SLURM_JOB_ID": "7",
    }
    assert only(findings, "launcher").text == "torchrun, in Slurm"
    assert only(check_settings({}), "environment").text == "no such variable is set"


def test_installed_launchers_are_reported_by_kind_of_cluster(tmp_path, monkeypatch):
    for name, source in (("sbatch", "echo slurm 25.05.1"), ("srun", ""), ("docker", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{source}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = check_tools()
    assert only(findings, "Slurm").text == "sbatch slurm 25.05.1, srun; scontrol not installed"
    assert only(findings, "Kubernetes").state is State.missing
    assert only(findings, "containers").text == "docker; enroot, apptainer not installed"
