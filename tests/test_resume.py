"""Stopped and started again: the same run, bit for bit in the same layout, within rounding in another one."""

import pytest
import torch

from megavit.testing import run_ranks
from tests import ranks
from tests.reference import SMALL

TWENTY_STEPS = [*SMALL, "train.steps=20", "data.shift=1"]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "model.drop_path=0.2"]


def assert_bit_equal(got: dict, want: dict) -> None:
    assert got["losses"] == want["losses"]
    assert got["groups"] == want["groups"]
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        assert torch.equal(got["weights"][name], weight), name
    assert len(got["optimizer"]) == len(want["optimizer"]) > 0
    for state, wanted in zip(got["optimizer"], want["optimizer"], strict=True):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2"]),
        (2, []),
        (2, ["parallel.tp=2", "optim=sgd", "optim.lr=0.01"]),
    ],
    ids=["TP 1", "TP 2", "PP 2", "DP 2", "TP 2 under SGD"],
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(world, overrides, tmp_path):
    overrides = [*TWENTY_STEPS, *DROPOUT, *overrides]
    want = run_ranks(ranks.train_and_keep, world, [*overrides, f"run.dir={tmp_path}/whole"])
    stopped = [*overrides, f"run.dir={tmp_path}/parts", "train.stop_at=10"]
    got = run_ranks(ranks.resume, world, stopped, [*overrides, f"run.dir={tmp_path}/parts"])
    for mine, whole in zip(got, want, strict=True):
        assert mine["code"] == 0
        assert_bit_equal(mine, whole)
        # The second half's samples, and no others; evaluation comes last on both sides.
        assert mine["due"] == whole["due"][len(whole["due"]) - len(mine["due"]) :]
        assert len(mine["due"]) < len(whole["due"])


def test_resume_in_other_layouts_continues_the_same_run(tmp_path, figure):
    overrides = [*TWENTY_STEPS, "train.steps=30"]
    want = run_ranks(ranks.train_and_keep, 1, [*overrides, f"run.dir={tmp_path}/whole"])[0]
    parts = [*overrides, f"run.dir={tmp_path}/parts"]
    for world, layout, stop in [(2, ["parallel.pp=2"], 10), (1, [], 20), (2, ["parallel.tp=2"], 30)]:
        got = run_ranks(ranks.train_and_keep, world, [*parts, *layout, f"train.stop_at={stop}"])[0]
        assert got["code"] == (0 if stop == 30 else 75)
    assert got["losses"].keys() == want["losses"].keys() == set(range(1, 31))
    worst = max(abs(got["losses"][step] - loss) for step, loss in want["losses"].items())
    figure(f"PP 2 → PP 1 → TP 2, resumed every 10 steps: largest |Δloss| {worst:.1e} in 30 steps")
    # Measured: 2.4e-7.
    assert worst <= 1e-6


def test_data_parallel_size_may_change_in_mid_epoch(tmp_path):
    overrides = [*TWENTY_STEPS, "train.steps=12"]
    want = run_ranks(ranks.train_and_keep, 1, [*overrides, f"run.dir={tmp_path}/whole"])[0]
    for world, stop in [(1, 4), (4, 8), (2, 12)]:
        got = run_ranks(
            ranks.train_and_keep, world, [*overrides, f"run.dir={tmp_path}/parts", f"train.stop_at={stop}"]
        )[0]
    # Measured: 2.4e-7.
    assert max(abs(got["losses"][step] - loss) for step, loss in want["losses"].items()) <= 1e-6


def test_raised_steps_go_on_and_settings_come_from_the_configuration(tmp_path):
    run = [*SMALL, f"run.dir={tmp_path}", "train.steps=6"]
    further = [*SMALL, f"run.dir={tmp_path}", "train.steps=9", "optim.lr=5e-4", "optim.weight_decay=0.2"]
    got = run_ranks(ranks.resume, 1, run, run, further)[0]
    assert got["code"] == 0
    assert sorted(got["losses"]) == list(range(1, 10))
    decayed = next(group for group in got["groups"] if group["wd_mult"] == 1.0)
    assert decayed["max_lr"] == 5e-4
    assert decayed["weight_decay"] == 0.2
    assert decayed["step"] == 9
