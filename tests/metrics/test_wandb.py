"""Weights & Biases without a network: a resumed run keeps its id."""

import json
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.runtime.test_launch import assert_one_message, run


def train_offline(overrides: list[str]) -> None:
    import os

    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    os.environ["WANDB_MODE"] = "offline"
    Trainer(compose(overrides)).run()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_id(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    keys = [*SMALL, "metrics.wandb=tests", f"run.dir={tmp_path}", "train.steps=4"]
    run_ranks(train_offline, 1, [*keys, "train.stop_at=2"])
    run_id = (tmp_path / "wandb_id").read_text().strip()
    run_ranks(train_offline, 1, keys)
    assert (tmp_path / "wandb_id").read_text().strip() == run_id
    starts = [path for path in (tmp_path / "wandb").glob("offline-run-*") if path.is_dir()]
    assert len(starts) == 2
    assert all(path.name.endswith(f"-{run_id}") for path in starts)
    assert all((path / f"run-{run_id}.wandb").stat().st_size > 0 for path in starts)


def test_without_the_package_the_setting_is_refused(tmp_path):
    # Hide the package, whether or not it is installed.
    (tmp_path / "wandb.py").write_text("raise ImportError('No module named wandb')\n")
    command = ["-m", "megavit", "train", *SMALL, "metrics.wandb=tests", f"run.dir={tmp_path / 'run'}"]
    result = run(*command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert_one_message(result, "metrics.wandb=tests needs the package wandb: pip install wandb, or set metrics.wandb=n")
    assert json.loads(Path(tmp_path / "run" / "exit.json").read_text())["code"] == 2
