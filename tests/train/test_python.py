"""`megavit.train` from Python: the command's losses, an unchanged process, a stop that saves, and `Run`."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megavit
from megavit.data.sources.digits import Digits
from tests.distributed import run_ranks
from tests.ranks import train as train_on_ranks
from tests.reference import SMALL


def losses(run: megavit.Run) -> list[float]:
    return run.metrics.query("split == 'train'").loss.tolist()


def state_of_process() -> dict:
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "generator": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "world": dist.is_initialized(),
        "warnings": list(warnings.filters),
        "level": logging.getLogger("megatron.core.dist_checkpointing.optimizer").level,
        "modules": "megavit_passed" in sys.modules,
        "environment": dict(os.environ),
    }


def test_two_runs_in_one_process_have_the_losses_of_a_rank_of_the_command_and_leave_no_trace(tmp_path):
    torch.manual_seed(5)
    before, running = state_of_process(), threading.active_count()
    first = megavit.train(*SMALL, "recipe=digits", **{"run.dir": tmp_path / "first"})
    second = megavit.train("digits", *SMALL, "parallel.recompute=full", **{"run.dir": tmp_path / "second"})
    assert state_of_process() == before
    assert threading.active_count() <= running
    expected = run_ranks(train_on_ranks, 1, [*SMALL, f"run.dir={tmp_path / 'rank'}"])[0]
    assert losses(first) == losses(second) == expected["losses"]
    assert first.finished and not first.stopped
    assert first.dir == tmp_path / "first"
    assert first.config.train.steps == 10


def test_the_package_stays_callable_after_its_modules_are_imported():
    import megavit.train.trainer

    assert megavit.train.trainer.Trainer
    with pytest.raises(megavit.ConfigError, match="lrr"):
        megavit.train("digits", "optim.lrr=1")


def test_sigint_saves_and_returns_and_the_same_call_resumes(tmp_path):
    def stop(report) -> None:
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)

    settings = {"run.dir": tmp_path}
    stopped = megavit.train("digits", *SMALL, callbacks=[stop], **settings)
    assert (stopped.stopped, stopped.step) == (True, 4)
    resumed = megavit.train("digits", *SMALL, **settings)
    assert resumed.finished
    whole = run_ranks(train_on_ranks, 1, [*SMALL, f"run.dir={tmp_path / 'whole'}"])[0]
    assert losses(resumed) == whole["losses"]


def test_a_second_sigint_raises_at_once(tmp_path):
    def stop(report) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = state_of_process()
    with pytest.raises(KeyboardInterrupt):
        megavit.train("digits", *SMALL, callbacks=[stop], **{"run.dir": tmp_path})
    assert state_of_process() == before
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 1


def test_a_thread_trains_without_handlers(tmp_path):
    found = []
    work = threading.Thread(
        target=lambda: found.append(megavit.train("digits", *SMALL, "train.steps=3", **{"run.dir": tmp_path}))
    )
    work.start()
    work.join()
    assert found[0].finished


class Fault(Exception):
    pass


def test_a_fault_passes_through_and_releases_the_network(tmp_path):
    class Raises:
        def on_step_end(self, report) -> None:
            raise Fault(report.step)

    before = state_of_process()
    with pytest.raises(Fault) as error:
        megavit.train("digits", *SMALL, callbacks=[Raises], **{"run.dir": tmp_path})
    assert state_of_process() == before
    names = [entry.frame.f_globals["__name__"] for entry in error.traceback]
    assert "megavit.train.trainer" in names
    kept = [entry.frame.raw.f_locals for entry in error.traceback if "trainer" in entry.frame.f_globals["__name__"]]
    assert kept == [{}] * len(kept)
    exit_file = json.loads((tmp_path / "exit.json").read_text())
    assert (exit_file["code"], "Fault: 1" in exit_file["error"]) == (1, True)


def test_a_wrong_setting_is_a_config_error_and_a_folder_in_use_too(tmp_path):
    from megavit.runtime.run_dir import claim_folder

    with pytest.raises(megavit.ConfigError, match="global_batch"):
        megavit.train("digits", *SMALL, "train.micro_batch=5", **{"run.dir": tmp_path})
    with claim_folder(tmp_path), pytest.raises(megavit.ConfigError, match="in use by process"):
        megavit.train("digits", *SMALL, **{"run.dir": tmp_path})


def test_own_parts_are_passed_as_objects_in_one_process(tmp_path):
    class Half:
        classes = Digits("train").classes
        image_shape = Digits("train").image_shape

        def __init__(self, config, split) -> None:
            self.digits = Digits(split)

        def __len__(self) -> int:
            return 32

        def image(self, index):
            return self.digits.image(index)

        def label(self, index):
            return self.digits.label(index)

    class Noted(torch.optim.RAdam):
        steps = 0

        def step(self, *arguments):
            Noted.steps += 1
            return super().step(*arguments)

    seen = []

    def negative(image):
        seen.append(image)
        return 255 - image

    run = megavit.train("digits", *SMALL, source=Half, optimizer=Noted, transform=negative, **{"run.dir": tmp_path})
    log = (tmp_path / "train.log").read_text()
    assert "data.source is megavit_passed:Half, from an object of this process" in log
    assert "64 images of 10 classes" in log
    assert Noted.steps >= 10
    assert len(seen) == 160
    with pytest.raises(megavit.ConfigError, match="an object that a Python call passed, and no other process has it"):
        megavit.train("digits", *SMALL, "data.source=megavit_passed:Half", **{"run.dir": tmp_path})
    with pytest.raises(megavit.ConfigError, match=r"data.source: Half is an object of this process, and the 2 ranks"):
        megavit.train("digits", *SMALL, source=Half, **{"run.dir": run.dir, "run.ranks": 2})


def test_a_script_under_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(megavit.ConfigError, match="WORLD_SIZE=2 ranks were started"):
        megavit.train("digits", *SMALL, **{"run.dir": tmp_path})


def test_a_run_shows_its_metrics_its_best_checkpoint_and_its_curves(tmp_path):
    run = megavit.train("digits", *SMALL, eval_every=5, best=True, **{"run.dir": tmp_path})
    frame = run.metrics
    assert frame.query("split == 'val'").step.tolist() == [5, 10]
    assert frame.step.is_monotonic_increasing
    best = run.best
    assert best is not None
    assert best.metric == "top1"
    assert best.value == frame.query("split == 'val'").top1.max()
    assert best.checkpoint == tmp_path / "checkpoints" / f"step_{best.step:08d}"
    assert [axes.get_title() for axes in run.plot().axes] == ["loss", "top-1 accuracy"]
    assert repr(run) == f"Run('{tmp_path}': finished at step 10, best top1 {best.value:.4f} at step {best.step})"
    assert f"<td>top1 {best.value:.4f} at step {best.step}</td>" in run._repr_html_()
    assert megavit.Run(tmp_path).metrics.equals(frame)
    assert len(megavit.load(run).classes) == 10
    with pytest.raises(megavit.ConfigError, match="holds no run"):
        megavit.Run(tmp_path / "elsewhere")


def test_steps_that_were_trained_again_appear_once(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    rows = [(10, 3.0), (20, 2.0), (20, 1.5), (30, 1.0)]
    lines = [json.dumps({"step": step, "split": "train", "loss": loss}) for step, loss in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], '{"step": 2', *lines[2:]]) + "\n")
    run = megavit.Run(tmp_path)
    assert run.metrics.loss.tolist() == [3.0, 1.5, 1.0]
    assert run.step == 30


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["run.ranks=2", "parallel.tp=2"]])
def test_python_and_the_command_line_train_alike_to_the_bit(tmp_path, layout):
    settings = ["optim.lr=1e-3", "train.steps=20", "metrics.log_every=1", *layout]
    environment = {**os.environ, "MEGAVIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megavit", "train", "recipe=digits", *settings, f"run.dir={tmp_path / 'command'}"]
    subprocess.run(command, env=environment, check=True)
    script = f"import megavit; print(megavit.train('digits', *{settings!r}, **{{'run.dir': {str(tmp_path / 'py')!r}}}))"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    runs = [megavit.Run(tmp_path / name) for name in ("command", "py")]
    assert losses(runs[0]) == losses(runs[1])
    assert len(losses(runs[0])) == 20
    assert runs[0].best.metrics == runs[1].best.metrics


@pytest.mark.slow
def test_several_ranks_stop_at_sigint_and_a_wrong_image_is_a_config_error(tmp_path):
    settings = {"run.ranks": 2, "parallel.tp": 2, "run.dir": tmp_path, "train.steps": 100_000}
    timer = threading.Thread(target=_interrupt_when, args=(tmp_path / "metrics.jsonl",), daemon=True)
    timer.start()
    run = megavit.train("digits", *SMALL, **settings)
    assert run.stopped
    assert 0 < run.step < 100_000
    for index in range(100):
        image = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"no image")
    settings["run.dir"] = tmp_path / "bad"
    with pytest.raises(megavit.ConfigError, match=r"\.png"):
        megavit.train(data="folder", path=tmp_path / "images", model="vit_s16", val_fraction=0.2, **settings)


def _interrupt_when(file: Path) -> None:
    while not (file.exists() and file.stat().st_size):
        threading.Event().wait(0.1)
    os.kill(os.getpid(), signal.SIGINT)
