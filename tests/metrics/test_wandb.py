"""Weights & Biases without a network: a resumed run keeps its id."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.cli.test_mistakes import main_here
from tests.distributed import run_ranks
from tests.reference import SMALL


def train_offline(overrides: list[str]) -> None:
    import os

    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    os.environ["WANDB_MODE"] = "offline"
    Trainer(compose(overrides)).run()


def main_without_wandb(arguments: list[str]) -> tuple[int, str]:
    """Run a command as on a machine without the package, whether or not it is installed here."""
    with mock.patch.dict(sys.modules, {"wandb": None}):
        return main_here(arguments)


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
    arguments = ["train", *SMALL, "metrics.wandb=tests", f"run.dir={tmp_path / 'run'}"]
    code, output = run_ranks(main_without_wandb, 1, arguments)[0]
    assert code == 2
    assert output.count("megavit: ") == output.count("\n") == 1
    assert "metrics.wandb=tests needs the package wandb: pip install wandb, or set metrics.wandb=n" in output
    assert json.loads(Path(tmp_path / "run" / "exit.json").read_text())["code"] == 2
