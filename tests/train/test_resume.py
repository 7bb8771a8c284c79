"""Stopped and started again: the same run, bit for bit in the same layout, within rounding in another one."""

import pytest
import torch

from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL

# Stopped after 3, and 10 more.
THIRTEEN_STEPS = [*SMALL, "train.steps=13", "data.random_shift=1"]
PROBE = ["task=linear_probe", "optim=lars", "optim.lr=1", "optim.ema=0.9"]
TUNED = ["optim.layer_decay=0.7", "optim.freeze=[patch_embed.*,blocks.0.*]"]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "model.drop_path=0.2"]


def assert_bit_equal(got: dict, want: dict) -> None:
    assert got["losses"] == want["losses"]
    assert got["groups"] == want["groups"]
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        assert torch.equal(got["weights"][name], weight), name
    assert len(got["averages"]) == len(want["averages"])
    assert all(torch.equal(mine, full) for mine, full in zip(got["averages"], want["averages"], strict=True))
    assert len(got["optimizer"]) == len(want["optimizer"]) > 0
    for state, wanted in zip(got["optimizer"], want["optimizer"], strict=True):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        pytest.param(1, [], id="TP 1", marks=pytest.mark.slow),
        pytest.param(2, ["parallel.tp=2"], id="TP 2", marks=pytest.mark.slow),
        pytest.param(2, ["parallel.pp=2"], id="PP 2", marks=pytest.mark.slow),
        pytest.param(2, [], id="DP 2"),
        pytest.param(2, ["parallel.tp=2", "optim=sgd", "optim.lr=0.01"], id="TP 2 under SGD", marks=pytest.mark.slow),
        pytest.param(2, ["parallel.tp=2", "optim.ema=0.9", "train.precision=bf16_o2"], id="TP 2, average, bf16"),
        pytest.param(2, [*PROBE, "parallel.tp=2", "train.precision=bf16_o2"], id="TP 2, probe, LARS, average, bf16"),
        pytest.param(2, [*TUNED, "parallel.tp=2"], id="TP 2, layer decay, frozen in part", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(world, overrides, tmp_path):
    overrides = [*THIRTEEN_STEPS, *([] if PROBE[0] in overrides else DROPOUT), *overrides, "train.steps=8"]
    want = run_ranks(ranks.train_and_keep, world, [*overrides, f"run.dir={tmp_path}/whole"])
    stopped = [*overrides, f"run.dir={tmp_path}/parts", "train.stop_at=3"]
    got = run_ranks(ranks.resume, world, stopped, [*overrides, f"run.dir={tmp_path}/parts"])
    for mine, full in zip(got, want, strict=True):
        assert mine["code"] == 0
        assert_bit_equal(mine, full)
        # The second half's samples, and no others; evaluation comes last on both sides.
        assert mine["due"] == full["due"][len(full["due"]) - len(mine["due"]) :]
        assert len(mine["due"]) < len(full["due"])


FROZEN = {
    "the probe": ["task=linear_probe", "optim.weight_decay=0.1"],
    "the first half": ["optim.freeze=[patch_embed.*,cls_token,pos_embed,blocks.0.*,blocks.1.*]"],
    "the last half": ["optim.freeze=[blocks.2.*,blocks.3.*,norm.*,head.*]"],
}

# The probe's batch norm takes its statistics over the micro batches of all data-parallel ranks.
DP_2 = (2, ["train.micro_batch=2"])


@pytest.mark.parametrize(
    ("frozen", "before", "after"),
    [
        ("the probe", (2, ["parallel.pp=2"]), (2, ["parallel.pp=2"])),
        ("the first half", (2, ["parallel.pp=2"]), (1, [])),
        *(
            pytest.param(frozen, before, after, marks=pytest.mark.slow)
            for frozen in FROZEN
            for before in [(2, ["parallel.pp=2"]), (2, ["parallel.pp=2", "parallel.vpp=2"]), (2, ["parallel.tp=2"])]
            for after in [(1, []), (2, ["parallel.pp=2"]), (4, ["parallel.tp=2", "parallel.pp=2"]), DP_2]
        ),
    ],
)
def test_adam_keeps_its_count_of_updates_where_a_rank_trains_nothing(frozen, before, after, tmp_path, figure):
    run = [*SMALL, *FROZEN[frozen], "optim.warmup_steps=0", "optim.betas=[0.9,0.999]", "train.steps=12"]
    want = run_ranks(ranks.train, 1, [*run, f"run.dir={tmp_path}/whole"])[0]
    (world, layout), (next_world, next_layout) = before, after
    parts = [*run, f"run.dir={tmp_path}/parts"]
    run_ranks(ranks.train_and_keep, world, [*parts, *layout, "train.stop_at=6"])
    got = run_ranks(ranks.train_and_keep, next_world, [*parts, *next_layout])
    # A rank that trains nothing has no state, and does not count.
    assert {max(group["step"] for group in rank["groups"]) for rank in got if rank["optimizer"]} == {12}
    losses = got[0]["losses"]
    assert len(losses) == 12
    worst = max(abs(losses[step] - loss) for step, loss in enumerate(want["losses"], start=1))
    figure(f"{frozen} frozen, {before} then {after}: largest |Δloss| {worst:.1e} in 12 steps")
    # Measured over all pairs: 3.6e-7.
    assert worst <= 5e-6


def test_buckets_of_another_size_continue_the_same_run(tmp_path, figure):
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    overrides = [*THIRTEEN_STEPS, *overlap, "train.steps=9"]
    want = run_ranks(ranks.train_and_keep, 2, [*overrides, f"run.dir={tmp_path}/whole"])[0]
    small = [*overrides, "parallel.bucket_size=3000", f"run.dir={tmp_path}/parts"]
    for stop, settings in ((3, small), (6, [*overrides, f"run.dir={tmp_path}/parts"]), (9, small)):
        got = run_ranks(ranks.train_and_keep, 2, [*settings, f"train.stop_at={stop}"])[0]
    assert got["losses"].keys() == want["losses"].keys() == set(range(1, 10))
    worst = max(abs(got["losses"][step] - loss) for step, loss in want["losses"].items())
    figure(f"DP 2, buckets of 3,000 weights, of all, of 3,000: largest |Δloss| {worst:.1e} in 9 steps")
    # Measured: 1.2e-7. The norm is summed in another order.
    assert worst <= 1e-6


@pytest.mark.slow
def test_resume_in_other_layouts_continues_the_same_run(tmp_path, figure):
    overrides = [*THIRTEEN_STEPS, "train.steps=16"]
    want = run_ranks(ranks.train_and_keep, 1, [*overrides, f"run.dir={tmp_path}/whole"])[0]
    parts = [*overrides, f"run.dir={tmp_path}/parts"]
    for world, layout, stop in [(2, ["parallel.pp=2"], 3), (1, [], 6), (2, ["parallel.tp=2"], 16)]:
        got = run_ranks(ranks.train_and_keep, world, [*parts, *layout, f"train.stop_at={stop}"])[0]
        assert got["code"] == (0 if stop == 16 else 75)
    assert got["losses"].keys() == want["losses"].keys() == set(range(1, 17))
    worst = max(abs(got["losses"][step] - loss) for step, loss in want["losses"].items())
    figure(f"PP 2 → PP 1 → TP 2, stopped after 3 and 6: largest |Δloss| {worst:.1e} in 16 steps")
    # Measured: 2.4e-7.
    assert worst <= 1e-6


def test_data_parallel_size_may_change_in_mid_epoch(tmp_path):
    overrides = [*THIRTEEN_STEPS, "train.steps=9"]
    want = run_ranks(ranks.train_and_keep, 1, [*overrides, f"run.dir={tmp_path}/whole"])[0]
    for world, stop in [(1, 3), (4, 6), (2, 9)]:
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


@pytest.mark.slow
def test_a_run_may_start_from_another_runs_checkpoint_and_then_goes_on_from_its_own(tmp_path):
    overrides = [*SMALL, "train.steps=8"]
    want = run_ranks(ranks.train_and_keep, 1, [*overrides, f"run.dir={tmp_path}/whole", "checkpoint.save_every=4"])[0]
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000004"
    assert checkpoint.is_dir()
    branch = [*overrides, f"run.dir={tmp_path}/branch", f"checkpoint.resume={checkpoint}"]
    run_ranks(ranks.train_and_keep, 1, [*branch, "train.stop_at=6"])
    got = run_ranks(ranks.train_and_keep, 1, branch)[0]
    assert got["losses"] == {step: want["losses"][step] for step in (5, 6, 7, 8)}


def test_another_seed_or_network_is_refused_by_name(tmp_path):
    run = [*SMALL, f"run.dir={tmp_path}", "train.steps=3"]
    run_ranks(ranks.train_and_keep, 2, run)
    for change, named in [("run.seed=1", "run.seed was 0 and is 1"), ("model.pool=mean", "model.pool was cls")]:
        with pytest.raises(AssertionError, match=f"is of another model or run: {named}") as refused:
            run_ranks(ranks.train_and_keep, 2, [*run, "train.steps=4", change])
        assert str(refused.value).count("ConfigError: ") == 2, "every rank raises the same error"


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sgd_resumes_with_and_without_momentum(momentum, tmp_path):
    run = [*SMALL, f"run.dir={tmp_path}", "optim=sgd", "optim.lr=0.01", f"optim.momentum={momentum}", "train.steps=4"]
    assert run_ranks(ranks.resume, 1, [*run, "train.stop_at=2"], run)[0]["code"] == 0


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_momentum_that_begins_on_a_resume_is_refused(optimizer, tmp_path):
    run = [*SMALL, f"run.dir={tmp_path}", f"optim={optimizer}", "optim.lr=0.01", "train.steps=4"]
    run_ranks(ranks.train_and_keep, 1, [*run, "optim.momentum=0", "train.stop_at=2"])
    with pytest.raises(AssertionError, match=r"optim.momentum=0.9, but .* its run had optim.momentum=0"):
        run_ranks(ranks.train_and_keep, 1, [*run, "optim.momentum=0.9"])


def test_a_norm_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    run = [
        *SMALL,
        f"run.dir={tmp_path}",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "checkpoint.save_every=1",
        "optim.clip_grad=0",
    ]
    with pytest.raises(
        AssertionError,
        match=r"the gradient norm is nan; .* The weights were not updated and the last checkpoint is unchanged",
    ):
        run_ranks(ranks.train_and_keep, 1, run)
    assert (tmp_path / "checkpoints" / "latest").exists()
