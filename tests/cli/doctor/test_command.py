"""Test `megavit doctor`: exit codes, the table, its JSON."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from megavit.cli.arguments import parse
from megavit.cli.doctor import command
from megavit.cli.doctor.arguments import DoctorArgs
from megavit.cli.doctor.finding import Finding, State
from megavit.cli.doctor.report import Report
from megavit.errors import ConfigError
from tests.cli.doctor.machines import on_cpu, pretend


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "MEGAVIT_DEVICE": "cpu", "COLUMNS": "100", **environment},
    )  # fmt: skip


def doctor(arguments: list[str]) -> int:
    args, _ = parse("megavit doctor", DoctorArgs, arguments)
    return command.doctor(args)


def states(findings: list[dict]) -> list[tuple[str, str]]:
    return [(found["state"], found["name"]) for found in findings]


def test_a_healthy_machine_exits_with_0_and_json_holds_the_tables_findings_without_a_secret(tmp_path, figure):
    secret = "s3cr3t-value"
    out = tmp_path / "doctor.json"
    result = run(
        "megavit", "doctor", f"run.dir={tmp_path / 'run'}", f"out={out}", FAKE_TOKEN=secret, NCCL_API_KEY=secret
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    report = json.loads(out.read_text())
    assert report["code"] == 0
    row = re.compile(r"^ (ok|missing|broken) +(\S.*?)  +\S", re.MULTILINE)
    assert row.findall(result.stdout) == states(report["findings"])
    assert {found["section"] for found in report["findings"]} == {
        "versions", "imports", "devices", "kernels", "disk", "settings", "launchers", "network",
    }  # fmt: skip
    assert secret not in result.stdout + out.read_text()
    assert "training can start; the missing parts" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_under_torchrun_rank_0_reports(tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megavit.cli.doctor.rank"]
    result = run(*launcher, f"run.dir={tmp_path}", "out=-")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert ("ok", "all-reduce, gloo") in states(report["findings"])
    (launchers,) = [found for found in report["findings"] if found["name"] == "launcher"]
    assert launchers["text"].startswith("torchrun")
    # The report counts the ranks of torchrun.
    result = run(*launcher, "run.ranks=2")
    assert result.returncode == 1  # torchrun's own code
    assert result.stderr.count("megavit: run.ranks=2 would be ignored: another launcher has started the ranks") == 1


def test_a_broken_torch_is_reported_without_a_traceback_and_everything_else_is_checked(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cuda.so: undefined symbol')")
    pretend(tmp_path, "megatron-core", "0.15.2")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    result = run("megavit", "doctor", f"run.dir={tmp_path / 'run'}", "out=-", PYTHONPATH=path)
    assert result.returncode == 3
    assert result.stderr == ""
    report = json.loads(result.stdout)
    found = {name: state for state, name in states(report["findings"])}
    assert report["code"] == 3
    assert {name for name, state in found.items() if state == "broken"} == {
        "megatron-core", "torch", "megavit.train.trainer", "training on", "attention", "all-reduce",
    }  # fmt: skip
    assert found["run folder"] == found["processor"] == "ok"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run.rank=2", "did you mean run.ranks=?"),
        ("run.ranks=0", "run.ranks=0 must be a whole number of at least 1"),
        ("run.name=a/b", "run.dir takes a path"),
        ("run.dir=", "run.dir=: megavit doctor takes run.dir= once, with a value"),
        ("out=/proc/doctor.json", "out=/proc/doctor.json cannot be written"),
        ("ranks", "'ranks' is no setting"),
    ],
)
def test_a_wrong_argument_is_rejected_before_any_check(argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        doctor([argument])
    with pytest.raises(ConfigError, match=r"run.name=a would be ignored: run.dir=b"):
        doctor(["run.name=a", "run.dir=b"])


def test_the_command_starts_without_torch():
    reach = (
        "import sys; sys.argv = ['megavit', 'doctor', 'run.rank=2']; from megavit.cli.main import main; code = main();"
        "assert not {'torch', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", reach], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "megavit: megavit doctor knows no run.rank=; did you mean run.ranks=?\n"


def quick(monkeypatch, *found: Finding) -> None:
    """Run only the fast checks of this machine, and add prepared findings."""
    monkeypatch.setattr(command, "run_in_subprocess", lambda names: iter([*found, *on_cpu()]))
    monkeypatch.setattr(command, "check_network", lambda *_, **__: [])


def test_an_unwritable_run_folder_or_another_megatron_core_leaves_with_3(tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    assert doctor([f"run.dir={tmp_path}"]) == 0
    (tmp_path / "file").write_text("")
    assert doctor([f"run.dir={tmp_path / 'file'}"]) == 3
    assert "training cannot start: run folder" in capsys.readouterr().out
    monkeypatch.syspath_prepend(pretend(tmp_path / "other", "megatron-core", "0.15.2"))
    assert doctor([f"run.dir={tmp_path}"]) == 3
    output = capsys.readouterr().out
    assert "0.15.2 is installed, and megavit needs ==0.16.1" in output
    assert "training cannot start: megatron-core" in output


def test_a_check_that_raises_is_reported_as_broken(tmp_path, monkeypatch, capsys):
    def fail():
        raise ModuleNotFoundError("No module named 'packaging'")

    quick(monkeypatch)
    monkeypatch.setattr(command, "check_versions", fail)
    assert doctor([f"run.dir={tmp_path}", "out=-"]) == 3
    first = json.loads(capsys.readouterr().out)["findings"][0]
    assert first["text"] == "cannot be checked: ModuleNotFoundError: No module named 'packaging'"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_loses_no_bracket(width):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    report = Report(lambda *output: console.print(*output, highlight=False, markup=False))
    long = Finding("imports", "transformer-engine", State.missing, "not installed " * 12, "pip install 'megavit[te]'")
    report.add([long, Finding("imports", "torch", State.ok, "computes")])
    report.close()
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.rstrip().endswith("→ pip install 'megavit[te]'") for line in lines)
    assert lines[-1] == "training can start; the missing parts (1) are needed by some settings only"


def test_without_rich_the_findings_are_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    report = Report(print)
    report.add([Finding("imports", "rich", State.broken, "not installed", "pip install 'rich>=13'")])
    assert capsys.readouterr().out == "imports  broken  rich  not installed\n→ pip install 'rich>=13'\n"


@pytest.mark.gpu
def test_each_gpu_is_reported_and_nccl_reduces_across_all_of_them(tmp_path):
    result = run("megavit", "doctor", f"run.dir={tmp_path}", "out=-", MEGAVIT_DEVICE="cuda")
    report = json.loads(result.stdout)
    assert result.returncode == 0, report
    assert {("ok", "GPU 0"), ("ok", "sdpa"), ("ok", "all-reduce, nccl"), ("ok", "all-reduce, gloo")} <= set(
        states(report["findings"])
    )
