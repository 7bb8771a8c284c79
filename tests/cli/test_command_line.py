"""Test the command line: its help, and its exit if the output has no reader or training diverges."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from megavit import __version__
from megavit.cli.main import main
from megavit.runtime.exit_handler import run_rank
from megavit.runtime.rank_log import RankLog
from tests.distributed import run_ranks


def test_version_names_megavit_torch_and_megatron_core(capsys):
    assert main(["--version"]) == 0
    versions = f"(torch {version('torch')}, megatron-core {version('megatron-core')})"
    assert capsys.readouterr().out == f"megavit {__version__} {versions}\n"


def test_help_that_nobody_reads_to_its_end_is_silent():
    reading, writing = os.pipe()
    os.close(reading)
    # So early that no torch is imported; what Python itself would say at its end is an exit code of 120.
    done = subprocess.run(
        [sys.executable, "-m", "megavit", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def without_reader(run_dir: Path, through_rich: bool) -> tuple[int, str]:
    """Run a rank whose standard output is a pipe without a reader; return its exit code and its messages."""

    def work() -> int:
        (Console().print if through_rich else print)("step 1")
        return 0

    kept, (reading, writing) = os.dup(1), os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.close(writing)
    try:
        # A stream of this pipe: that of the process may know its former file as one that can be sought in.
        stream = open(1, "w", closefd=False)  # noqa: SIM115
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(io.StringIO()) as said:
            code = run_rank(work, run_dir=lambda: run_dir, log=RankLog())
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    return code, said.getvalue()


@pytest.mark.parametrize("through_rich", [True, False])
def test_a_run_whose_output_nobody_reads_says_so_in_a_line(through_rich, tmp_path):
    ((code, said),) = run_ranks(without_reader, 1, tmp_path, through_rich)
    assert code == 1
    assert said.startswith("megavit: stopped: the command that read its output has ended")
    assert said.count("\n") == 1
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 1


def test_a_diverged_run_says_its_words_without_a_stack(tmp_path, capsys):
    def work() -> int:
        raise FloatingPointError("step 2: the gradient norm is nan. Lower optim.lr")

    assert run_rank(work, run_dir=lambda: tmp_path) == 1
    assert capsys.readouterr().err == "megavit: step 2: the gradient norm is nan. Lower optim.lr\n"
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 1


def log_of_a_signal(run_dir: Path) -> str:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    # Before the log is open it waits. To this thread: another one of a reused rank may not hold it back.
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    RankLog().open(run_dir, rank=0, world_size=1)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    return (run_dir / "logs" / "rank_00000.log").read_text()


def test_a_run_of_one_process_leaves_its_stack_at_sigusr2(tmp_path):
    (log,) = run_ranks(log_of_a_signal, 1, tmp_path)
    assert log.count("in log_of_a_signal") == 2
