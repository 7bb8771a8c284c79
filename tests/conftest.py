import os
import signal
import subprocess
from pathlib import Path

import pytest

from megavit.runtime.startup import gc_paused

# Before anything imports Megatron-Core: the tests replay the layouts on CPU processes, also on a GPU machine.
os.environ.setdefault("MEGAVIT_DEVICE", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import all tests, and with them most of what there is, in the time that it takes without garbage collection."""
    with gc_paused():
        return (yield)


# The files that take longest, the longest first: two processes that take file after file then end together.
LONGEST = (
    "test_readme.py",
    "cluster/slurm/test_submit.py",
    "train/test_resume.py",
    "train/test_engine.py",
    "train/test_parity.py",
    "runtime/test_launch.py",
    "runtime/test_kill.py",
    "checkpoint/test_layouts.py",
    "runtime/test_signals.py",
    "cli/test_mistakes.py",
    "test_mae_parity.py",
    "parallel/test_traffic.py",
    "test_config.py",
    "benchmarks/test_step.py",
    "cli/test_commands.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True)
def signal_mask():
    """Restore the signals that a command blocks in this process; processes of other tests inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of a size, such as 300k; skipped where that is not allowed."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True)
        if mounted.returncode:
            pytest.skip(f"no small disk here: {mounted.stderr.decode().strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def figure(record_property):
    """Keep a measured figure for the end of the run, where it is read without -s."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    lines = [value for report in reports for name, value in report.user_properties if name == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in dict.fromkeys(lines):
            terminalreporter.write_line(line)
