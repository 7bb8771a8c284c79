"""The masked autoencoder in every layout against plain torch: ten steps on real digits."""

import pytest

from tests.train.test_parity import assert_same_training, train_both

MAE = [
    "task=mae",
    "task.decoder_hidden_size=24",
    "task.decoder_ffn_size=48",
    "task.decoder_num_heads=2",
    "task.decoder_num_layers=2",
    "task.baseline_samples=64",
    "model.positions=sincos",
]
# 4 of 16 patches are seen: with 8 class tokens 12 cross from stage to stage, which two ranks can share.
SP = ["parallel.tp=2", "parallel.sequence_parallel=true", "model.class_tokens=8"]
GRID = ["parallel.tp=2", "parallel.pp=2"]

LAYOUTS = {
    "one rank": (1, []),
    "one rank, pixels as they are": (1, ["task.norm_pix_loss=false"]),
    "TP 2": (2, ["parallel.tp=2"]),
    "PP 2": (2, ["parallel.pp=2"]),
    "PP 2, no layer on the last stage": (2, ["parallel.pp=2", "parallel.stages=[4,0]"]),
    "TP 2 × PP 2": (4, GRID),
    "DP 2": (2, []),
    "TP 2 + SP": (2, SP),
    "TP 2 + SP, PP 2": (4, [*SP, "parallel.pp=2"]),
    "full recompute": (1, ["parallel.recompute=full"]),
    "selective recompute, TP 2 × PP 2": (4, [*GRID, "parallel.recompute=selective"]),
    "full recompute of groups of 2, PP 2": (
        2,
        ["parallel.pp=2", "parallel.stages=[2,2]", "parallel.recompute=full", "parallel.recompute_layers=2"],
    ),
    "VPP 2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "learned positions, no class token": (1, ["model.positions=learned", "model.class_tokens=0", "model.pool=mean"]),
    "half hidden, qk-norm, layer scale": (
        1,
        ["task.mask_ratio=0.5", "model.qk_norm=true", "model.layer_scale=0.1"],
    ),
    "half hidden, qk-norm, layer scale, TP 2": (
        2,
        ["parallel.tp=2", "task.mask_ratio=0.5", "model.qk_norm=true", "model.layer_scale=0.1"],
    ),
}


# Kept for `make test-slow`: each is its neighbours' sum.
SLOW = (
    "TP 2",
    "PP 2",
    "TP 2 + SP, PP 2",
    "selective recompute, TP 2 × PP 2",
    "full recompute of groups of 2, PP 2",
    "half hidden, qk-norm, layer scale, TP 2",
)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_ten_steps_equal_plain_torch(layout, tmp_path, figure):
    world, overrides = LAYOUTS[layout]
    assert_same_training(*train_both(world, [*MAE, *overrides], tmp_path), f"MAE, {layout}", figure)
