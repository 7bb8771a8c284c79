import signal
import sys

import pytest

from megavit.errors import ConfigError, RunError
from megavit.runtime.command import run_command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a shell script in place of `python`; its arguments are those of `python`."""

    def put(body: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return put


def test_what_the_command_prints_is_shown_and_its_code_is_returned(command, capsys):
    command('echo "$@"; echo careful >&2; exit 75')
    assert run_command(["train", "optim.lr=1", "run.name=a b"]) == 75
    assert capsys.readouterr() == ("-m megavit train optim.lr=1 run.name=a b\n", "careful\n")


def test_a_refusal_is_a_config_error_with_the_commands_message_alone(command):
    command('echo "warning: x" >&2; echo "megavit: optim.lr=-1 must be positive" >&2; exit 2')
    with pytest.raises(ConfigError, match=r"\Aoptim\.lr=-1 must be positive\Z"):
        run_command(["train"])


def test_a_fault_is_a_run_error_with_code_and_message(command):
    command('echo "Traceback: broken" >&2; exit 1')
    with pytest.raises(RunError, match="megavit train left with exit code 1: Traceback: broken") as error:
        run_command(["train"])
    assert error.value.code == 1


def test_a_signal_is_handed_on_and_an_interrupt_without_a_save_is_a_keyboard_interrupt(command):
    before = signal.getsignal(signal.SIGINT)
    # The parent's process number is this test's.
    command('trap "exit 75" TERM; trap "exit 1" INT; kill -TERM $PPID; while :; do sleep 0.05; done')
    assert run_command(["train"]) == 75
    command('trap "exit 1" INT; kill -INT $PPID; while :; do sleep 0.05; done')
    with pytest.raises(KeyboardInterrupt):
        run_command(["train"])
    assert signal.getsignal(signal.SIGINT) is before
