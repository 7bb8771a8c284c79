"""Test that a resumed masked autoencoder computes the same bits with the same masks, in any layout."""

import json

import pytest

from tests import ranks
from tests.distributed import run_ranks
from tests.test_mae_parity import GRID, MAE, SP
from tests.train.test_resume import DROPOUT, THIRTEEN_STEPS, assert_bit_equal

SETTINGS = [*THIRTEEN_STEPS, *MAE]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, [], id="TP 1", marks=pytest.mark.slow),
        pytest.param(4, GRID, id="TP 2 × PP 2", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(world, layout, tmp_path):
    overrides = [*SETTINGS, *DROPOUT, *layout]
    want = run_ranks(ranks.train_and_keep, world, [*overrides, f"run.dir={tmp_path}/whole"])
    parts = [*overrides, f"run.dir={tmp_path}/parts"]
    got = run_ranks(ranks.resume, world, [*parts, "train.stop_at=3"], parts)
    for mine, full in zip(got, want, strict=True):
        assert_bit_equal(mine, full)


@pytest.mark.slow
def test_recompute_draws_no_other_mask_and_gives_the_same_bits_with_dropout_on(tmp_path):
    overrides = [*SETTINGS, *DROPOUT, "train.steps=4", "parallel.tp=2"]
    want = run_ranks(ranks.train_and_keep, 2, [*overrides, f"run.dir={tmp_path}/none"])
    for mode in ("full", "selective"):
        got = run_ranks(
            ranks.train_and_keep, 2, [*overrides, f"parallel.recompute={mode}", f"run.dir={tmp_path}/{mode}"]
        )
        for mine, full in zip(got, want, strict=True):
            assert_bit_equal(mine, full)


@pytest.mark.slow
def test_a_change_of_layout_in_mid_run_keeps_every_mask(tmp_path, figure):
    # 1,437 samples: the third batch of 512 straddles two epochs, the sixth another two.
    overrides = [*SETTINGS, "train.steps=8", "train.global_batch=512", "train.micro_batch=128", "model.class_tokens=8"]
    want = run_ranks(ranks.masks, 1, [*overrides, f"run.dir={tmp_path}/whole"])[0]
    assert len(want["kept"]) == 8 * 512
    assert {epoch for _, epoch in want["kept"]} == {0, 1, 2}
    seen: dict = {}
    for world, layout, stop in [(2, ["parallel.pp=2"], 2), (4, GRID, 4), (2, [], 6), (2, SP, 8)]:
        for rank in run_ranks(
            ranks.masks, world, [*overrides, *layout, f"train.stop_at={stop}", f"run.dir={tmp_path}/parts"]
        ):
            # Every rank that draws draws the same.
            assert all(seen.setdefault(key, kept) == kept for key, kept in rank["kept"].items())
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    assert seen == want["kept"]
    worst = max(abs(losses[step] - loss) for step, loss in want["losses"].items())
    figure(f"MAE, PP 2 → TP 2 × PP 2 → DP 2 → TP 2 + SP: all masks equal, largest |Δloss| {worst:.1e} in 8 steps")
    assert worst <= 2e-6
