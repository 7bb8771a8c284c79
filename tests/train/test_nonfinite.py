"""Test a gradient that is not finite on one rank: no rank updates its weights, and all ranks name its origin."""

import random
import re

import pytest
import torch

from tests.distributed import run_ranks
from tests.reference import SMALL

LAYERS = ["embed.proj.weight", "blocks.layers.0.attn.qkv.weight", "blocks.layers.2.mlp.fc2.bias", "head.out.weight"]


def inject(overrides: list[str], plan: dict[int, tuple[int, str, float]]) -> dict:
    """Train; at each planned step one rank puts a value into one gradient of its own, after the backward pass and
    before the ranks add theirs up: that is where such a value would arise.
    """
    from megavit.config.compose import compose
    from megavit.model.vit import parameter_names
    from megavit.train.trainer import Trainer

    before, unchanged, messages = {}, [], []

    def is_unchanged() -> bool:
        return all(torch.equal(before[name], parameter) for name, parameter in named.items())

    def at_end(report) -> None:
        if report.skipped is not None:
            unchanged.append(is_unchanged())
            messages.append(report.skipped)

    trainer = Trainer(compose(overrides), on_step_end=[at_end], evaluates=False, saves=False)
    (chunk,) = trainer.chunks.values()
    named = parameter_names(chunk)
    (model,) = trainer.model
    add_up = model.finish_grad_sync

    def poisoned(**how):
        rank, layer, value = plan.get(trainer.step, (None, "", 0.0))
        if rank == trainer.layout.rank:
            named[layer].main_grad.view(-1)[0] = value
        before.update({name: parameter.detach().clone() for name, parameter in named.items()})
        add_up(**how)

    model.finish_grad_sync = poisoned
    error = None
    try:
        trainer.run()
    except FloatingPointError as raised:
        error = str(raised)
        unchanged.append(is_unchanged())
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in named.values())
    return {"step": trainer.step, "unchanged": unchanged, "messages": messages, "error": error, "finite": finite}


def test_ten_of_ten_bad_gradients_on_one_rank_are_caught_before_the_step(tmp_path):
    draw = random.Random(0)
    where = [(draw.randrange(2), draw.choice(LAYERS), draw.choice([float("nan"), float("inf")])) for _ in range(10)]
    plan = dict(zip(range(1, 20, 2), where, strict=True))
    overrides = [*SMALL, "parallel.tp=2", "train.steps=20", "train.on_nonfinite=skip", f"run.dir={tmp_path}"]
    for rank in run_ranks(inject, 2, overrides, plan):
        assert rank["step"] == 20
        assert rank["unchanged"] == [True] * 10
        assert rank["finite"]
        assert len(rank["messages"]) == 10
        for message, (step, (bad, layer, _)) in zip(rank["messages"], plan.items(), strict=True):
            assert re.search(rf"step {step + 1}: .* gradient of {layer} is not finite on rank {bad}", message)


@pytest.mark.parametrize(
    ("world", "layout"), [(2, ["parallel.tp=2"]), (2, ["parallel.pp=2"]), (2, [])], ids=["TP 2", "PP 2", "DP 2"]
)
def test_a_run_stops_on_all_ranks_before_a_bad_step(world, layout, tmp_path):
    layer = "blocks.layers.0.attn.qkv.weight"
    for rank in run_ranks(inject, world, [*SMALL, *layout, f"run.dir={tmp_path}"], {3: (0, layer, float("nan"))}):
        assert rank["step"] == 3
        assert rank["unchanged"] == [True]
        assert "step 4: the gradient norm is " in rank["error"]
        assert f"the gradient of {layer} is not finite on rank 0" in rank["error"]
        assert "The weights were not updated" in rank["error"]
