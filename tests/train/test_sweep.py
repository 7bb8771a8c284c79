"""`megavit train -m`: a sweep killed and continued; most runs here take a second (tests/train/sweep_run.py)."""

import csv
import functools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavit.cli.main import main
from megavit.config.compose import compose
from megavit.config.saved import to_yaml
from megavit.config.settings import run_types
from megavit.config.sweep import SweepRun, read_swept
from megavit.errors import ConfigError
from megavit.train.sweep import machine
from megavit.train.sweep.machine import Slot, divide_machine
from megavit.train.sweep.options import SweepOptions
from megavit.train.sweep.optuna_queue import OptunaQueue
from megavit.train.sweep.plan import plan_run, plan_runs
from megavit.train.sweep.results import Outcome, Status, read_outcome
from megavit.train.sweep.table import SweepTable, draw_sweep
from tests.reference import SMALL

ROOT = Path(__file__).parents[2]
STOPPED = 75


def start(folder: Path, *arguments: str, module: str = "tests.train.sweep_driver") -> subprocess.Popen:
    """Start a sweep; its own process group, as a shell gives it."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MEGAVIT_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        process_group=0,
    )


def sweep(folder: Path, *arguments: str, module: str = "tests.train.sweep_driver") -> tuple[int, str]:
    """Run a sweep to its end: exit code and output."""
    process = start(folder, *arguments, module=module)
    output, _ = process.communicate(timeout=280)
    return process.returncode, output


def table(folder: Path, name: str = "digits") -> list[dict[str, str]]:
    with (folder / "multirun" / name / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(what, *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sweep_killed_and_interrupted_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    arguments = ["optim.lr=1e-3,1e-2,1", "train.steps=40"]
    disturbed, whole = tmp_path / "disturbed", tmp_path / "whole"
    first, second = (disturbed / "multirun/digits" / name for name in ("lr_0.001", "lr_0.01"))
    undisturbed = start(whole, *arguments)

    killed = start(disturbed, *arguments)
    wait_for(lambda: (first / "state").exists())
    killed.kill()
    killed.communicate()
    # At once: the run of the killed sweep may still save.
    stopped = start(disturbed, *arguments)
    wait_for(lambda: (second / "state").exists())
    stopped.send_signal(signal.SIGINT)
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == STOPPED, output
    assert "asked to stop by SIGINT: the runs save and stop" in output
    assert [row["status"] for row in table(disturbed)] == ["finished", "stopped", "pending"]

    code, output = sweep(disturbed, *arguments)
    whole_output, _ = undisturbed.communicate(timeout=120)
    # The third run diverges.
    assert (code, undisturbed.returncode) == (1, 1), output + whole_output
    files = [folder / "multirun/digits/sweep.csv" for folder in (disturbed, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row["status"] for row in table(disturbed)] == ["finished", "finished", "failed"]
    assert table(disturbed)[2]["reason"] == "step 5: the gradient norm is nan"
    assert "lr_0.001  finished    earlier" in output
    assert "megavit train optim.lr=0.01 train.steps=40 run.name=digits-lr_0.01\n" in output
    # The finished run was started twice, for the kill; the second one resumed and did not begin again.
    assert len((first / "starts.jsonl").read_text().splitlines()) == 2
    assert '"step": 0' not in (second / "starts.jsonl").read_text().splitlines()[-1]
    assert (disturbed / "multirun/digits/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_process_on_a_sweeps_folder_is_refused(tmp_path):
    running = start(tmp_path, "optim.lr=1e-3,1e-2", "train.steps=1000")
    wait_for(lambda: (tmp_path / "multirun/digits/sweep.csv").exists())
    code, output = sweep(tmp_path, "optim.lr=1e-3,1e-2", "train.steps=1000")
    assert code == 2
    assert "sweep.dir=multirun/digits is in use by process" in output
    assert len(output.splitlines()) == 1
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == STOPPED, output


WRONG = {
    "-m optim.lrr=1,2": "the setting optim.lrr does not exist; did you mean optim.lr, ",
    "-m optim.lr=1e-3": "--multirun needs a setting with several values",
    "-m optim.lr=1e-3,-1": "lr_-1: optim.lr=-1.0 must be a finite number",
    "-m model=vit_digits,vit_huge": "model=vit_huge does not exist",
    "-m run.name=a,b run.seed=1,2": "2 runs of the sweep would share the folder multirun/digits/a",
    "-m data.path=x/y,x.y": "2 runs of the sweep would share the folder",
    "-m optim.lr=1e-3,2e-3 run.dir=runs/x": "run.dir=runs/x: the runs of a sweep have folders below sweep.dir",
    "-m optim.lr=interval(0,1)": "is an interval, which a sampler draws from",
    "-m optim.lr=1e-3,2e-3 sweep.trials=3": "sweep.trials would be ignored without sweep.sampler=optuna",
    "-m optim.lr=1e-3,2e-3 sweep.sampler=optuna": "sweep.sampler=optuna needs sweep.trials=N",
    "-m optim.lr=1e-3,2e-3 sweep.parallel=0": "sweep.parallel=0",
    "-m optim.lr=1e-3,2e-3 sweep.sampler=random": "sweep.sampler=random must be one of grid, optuna",
    "optim.lr=1e-3 sweep.parallel=2": "sweep.parallel would be ignored without --multirun",
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_sweep_starts_nothing_and_says_why_in_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(["train", *line.split()])
    printed = capsys.readouterr().err
    assert code == 2
    assert WRONG[line] in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_sweep_or_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished = tmp_path / "multirun/digits/lr_0.001"
    finished.mkdir(parents=True)
    (finished / "config.yaml").write_text(to_yaml(compose(["optim.lr=1e-3", "train.steps=2"])))
    (finished.parent / "sweep.csv").write_text("run,optim.lr,status\n")
    values = ["--cfg", "-m", "optim.lr=1e-3,1e-2"]
    assert main(["train", "--cfg", "-m", "run.seed=1,2"]) == 2
    assert "holds a sweep over optim.lr, and this one is over run.seed" in capsys.readouterr().err
    assert main(["train", *values, "train.steps=2", "optim.weight_decay=0.2"]) == 2
    assert "holds a run with other settings: optim.weight_decay 0.05 there, 0.2 here" in capsys.readouterr().err
    assert main(["train", *values, "train.steps=2"]) == 0


def test_a_longer_run_of_a_finished_sweep_is_not_finished(tmp_path):
    (run,) = plan_runs([SweepRun("lr_0.001", {"optim.lr": "0.001"}, ["optim.lr=0.001"])], tmp_path, slot=Slot())
    run.dir.mkdir()
    (run.dir / "config.yaml").write_text(to_yaml(run.config))
    assert not run.is_finished
    (run.dir / "exit.json").write_text('{"code": 0, "error": null}')
    assert run.is_finished
    run.config.train.steps += 1
    assert not run.is_finished


def test_runs_at_the_same_time_have_disjoint_gpus_or_their_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(machine, "_visible_gpus", lambda: ["4", "5", "6", "7", "8"])
    slots = divide_machine(2)
    assert [slot.environment(2) for slot in slots] == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in ("4,5", "6,7")]
    with pytest.raises(ConfigError, match=r"sweep\.parallel=6 is more than the 5 GPUs here"):
        divide_machine(6)
    monkeypatch.setattr(machine, "_visible_gpus", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Slot(cores=8).environment(2) == {"OMP_NUM_THREADS": "4"}
    assert len(divide_machine(3)) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Slot(cores=8).environment(2) == {}


def test_a_run_that_the_system_killed_is_a_row_with_its_reason(tmp_path):
    (tmp_path / "exit.json").write_text('{"code": null, "error": null}')
    assert read_outcome(tmp_path, returncode=-9).reason == "ended by SIGKILL (often the machine ran out of memory)"
    assert read_outcome(tmp_path).status.value == "stopped"
    (tmp_path / "console.log").write_text("one\nRuntimeError: no memory\n\n")
    assert read_outcome(tmp_path, returncode=1).reason == "RuntimeError: no memory"
    assert read_outcome(tmp_path / "none").status.value == "pending"


def test_a_true_run_has_a_row_with_the_metric_that_selects_the_best_checkpoint(tmp_path):
    code, output = sweep(tmp_path, "train", "-m", *SMALL, "train.steps=3", "run.seed=choice(1)", module="megavit")
    assert code == 0, output
    (row,) = table(tmp_path)
    assert (row["run"], row["status"], row["steps"], row["metric"]) == ("seed_1", "finished", "3", "top1")
    assert 0 <= float(row["best"]) == float(row["last"]) <= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_true_runs_killed_at_random_twice_end_with_the_table_of_an_undisturbed_sweep(tmp_path, figure):
    arguments = [
        "train", "-m", *SMALL, "train.steps=60", "train.eval_every=20", "checkpoint.save_every=10",
        "optim.lr=1e-3,3e-3,1e-2", "run.seed=0,1",
    ]  # fmt: skip
    begun = time.monotonic()
    assert sweep(tmp_path / "whole", *arguments, module="megavit")[0] == 0
    took_s = time.monotonic() - begun
    draw = random.Random(0)
    for _ in range(2):
        running = start(tmp_path / "disturbed", *arguments, module="megavit")
        time.sleep(draw.uniform(0.2, 0.6) * took_s)
        running.kill()
        running.communicate()
    code, output = sweep(tmp_path / "disturbed", *arguments, module="megavit")
    assert code == 0, output
    files = [tmp_path / name / "multirun/digits/sweep.csv" for name in ("disturbed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row["status"] for row in table(tmp_path / "whole")] == ["finished"] * 6
    starts = sum(
        len(path.read_text().splitlines()) for path in (tmp_path / "disturbed").glob("multirun/digits/*/starts.jsonl")
    )
    assert starts >= 7
    figure(f"6 runs, undisturbed in {took_s:.0f} s; killed twice: {starts} starts, the same sweep.csv")


SEARCH = ["optim.lr=tag(log,interval(1e-4,0.5))", "train.steps=8", "sweep.sampler=optuna", "sweep.trials=8"]


def search(folder: Path, *, ends: int = 100, trials: int = 9) -> list[list[str]]:
    """Let a queue draw and prune without processes; it is given up within a run, after some have ended.

    Returns:
        Name, status and steps of each run that has ended.
    """
    folder.mkdir(exist_ok=True)
    settings = [read_swept(text, run_types()) for text in SEARCH[:2]]
    table = SweepTable(folder / "sweep.csv", ["optim.lr"])
    queue = OptunaQueue(
        settings,
        SweepOptions(trials=trials),
        folder,
        plan=functools.partial(plan_run, sweep_dir=folder, slot=Slot()),
        table=table,
    )
    while (run := queue.next()) is not None:
        run.dir.mkdir(exist_ok=True)
        quality = 1 - abs(math.log10(run.config.optim.lr) + 2) / 4
        rows = [{"step": step, "split": "val", "loss": 1.0, "top1": quality * step} for step in (2, 4, 6, 8)]
        (run.dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run.dir / "starts.jsonl").write_text('{"monitor": {"metric": "top1", "higher": true}}\n')
        table.add(run.name, run.varied, Outcome(Status.running))
        if ends == 0:
            queue.should_prune(run)
            break
        ends -= 1
        table.set(run.name, queue.end(run, read_outcome(run.dir, returncode=0)))
    return [[name, outcome.status.value, str(outcome.steps)] for name, outcome in table.outcomes.items()]


def test_a_search_draws_and_prunes_the_same_after_each_interruption(tmp_path):
    pytest.importorskip("optuna")
    whole = search(tmp_path / "whole")
    # The fifth run is interrupted, and the seventh, after its evaluations were reported.
    for ends in (4, 2, 100):
        disturbed = search(tmp_path / "disturbed", ends=ends)
    assert disturbed == whole
    statuses = [status for _, status, _ in whole]
    assert len(whole) == 9
    assert statuses[:5] == ["finished"] * 5
    assert "pruned" in statuses[5:]
    assert all((steps == "8") is (status == "finished") for _, status, steps in whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_and_stopped_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    pytest.importorskip("optuna")
    undisturbed = start(tmp_path / "whole", *SEARCH)
    for name, number in (("001-*", signal.SIGKILL), ("006-*", signal.SIGINT)):
        running = start(tmp_path / "disturbed", *SEARCH)
        wait_for(lambda name=name: list((tmp_path / "disturbed").glob(f"multirun/digits/{name}/state")))
        running.send_signal(number)
        running.communicate(timeout=60)
    code, output = sweep(tmp_path / "disturbed", *SEARCH)
    assert code == 0, output
    output, _ = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, output
    files = [tmp_path / name / "multirun/digits/sweep.csv" for name in ("disturbed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {row["status"] for row in table(tmp_path / "whole")} == {"finished", "pruned"}


def test_a_search_without_optuna_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["train", "-m", *SEARCH]) == 2
    assert "pip install 'megavit[sweep]'" in capsys.readouterr().err


def test_a_search_over_other_values_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    settings = [read_swept(text, run_types()) for text in ("optim.lr=interval(0,1)", "run.seed=1")]
    others = [read_swept(text, run_types()) for text in ("optim.lr=interval(0,2)", "run.seed=1")]
    table = SweepTable(tmp_path / "sweep.csv", ["optim.lr"])
    OptunaQueue(settings, SweepOptions(trials=1), tmp_path, plan=plan_nothing, table=table)
    # The same search, and a torn line of a killed process.
    with (tmp_path / "optuna.journal").open("a") as journal:
        journal.write('{"op_code": 4')
    OptunaQueue(settings, SweepOptions(trials=9), tmp_path, plan=plan_nothing, table=table)
    with pytest.raises(ConfigError, match=r"holds a search with optim\.lr=interval\(0,1\) run\.seed=1 sweep\.seed=0"):
        OptunaQueue(others, SweepOptions(trials=1), tmp_path, plan=plan_nothing, table=table)


def plan_nothing(run):
    raise AssertionError(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_optuna_finds_the_better_half_of_learning_rates_on_the_digits(tmp_path, figure):
    pytest.importorskip("optuna")
    code, output = sweep(
        tmp_path, "train", "-m", *SMALL, "train.steps=60", "train.eval_every=20", "train.global_batch=64",
        "train.micro_batch=64", "optim.lr=tag(log,interval(1e-6,1e-2))", "sweep.sampler=optuna", "sweep.trials=16",
        module="megavit",
    )  # fmt: skip
    assert code == 0, output
    rows = table(tmp_path)
    drawn = [float(row["optim.lr"]) for row in rows]
    best = max((row for row in rows if row["status"] == "finished"), key=lambda row: float(row["best"]))
    # The logarithm's middle is 1e-4: below it this model hardly learns in 60 steps.
    assert float(best["optim.lr"]) > 1e-4
    assert sum(lr > 1e-4 for lr in drawn[10:]) >= 5
    pruned = sum(row["status"] == "pruned" for row in rows)
    assert pruned > 0
    figure(f"16 trials: best lr {best['optim.lr']} with top-1 {best['best']}, {pruned} pruned; drawn {drawn}")


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "sweeps.md").read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("megavit ")]


@pytest.mark.parametrize("line", commands())
def test_each_command_of_the_page_is_accepted(line, tmp_path, monkeypatch, capsys):
    if "optuna" in line:
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    _, command, *words = shlex.split(line)
    # The runs are composed, checked and listed.
    assert main([command, *words, *(["--cfg"] if command == "train" and "--cfg" not in words else [])]) == 0
    assert "lr_" in capsys.readouterr().out


def test_the_picture_has_a_panel_for_each_numeric_setting_or_bars(tmp_path):
    from PIL import Image

    sizes = {}
    for keys in (["optim.lr"], ["optim.lr", "run.seed"], ["model"]):
        table = SweepTable(tmp_path / "sweep.csv", keys)
        for number in range(3):
            value = f"vit_{number}" if keys == ["model"] else str(number + 1)
            outcome = Outcome(Status.finished, 10, "top1", higher=True, best=0.1 * number, last=0.1)
            table.add(f"run_{number}", dict.fromkeys(keys, value), outcome)
        draw_sweep(table, tmp_path / "sweep.png")
        with Image.open(tmp_path / "sweep.png") as picture:
            sizes[len(keys), keys[0]] = picture.width
        assert table.best() == "run_2"
    assert sizes[2, "optim.lr"] == 2 * sizes[1, "optim.lr"]
    assert sizes[1, "model"] != sizes[1, "optim.lr"]
