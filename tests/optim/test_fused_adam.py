import pytest
import torch

from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.optim.fused_adam import FusedAdam
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL


def test_fused_adam_equals_torchs_adamw():
    torch.manual_seed(0)
    ours = [torch.randn(5, 7, requires_grad=True), torch.randn(3, requires_grad=True)]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine, reference = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # Measured: 2.4e-7.
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert mine.param_groups[0]["step"] == 20


def test_gradients_are_divided_in_the_next_step_only():
    torch.manual_seed(0)
    ours = [torch.randn(5, 7, requires_grad=True), torch.randn(1003, requires_grad=True)]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    mine, reference = FusedAdam(ours, lr=1e-2), FusedAdam(theirs, lr=1e-2)
    for divisor in (3.7, 1.0, 2.3, None):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad / (divisor or 1)
        if divisor is not None:
            mine.divide_gradients_by(divisor)
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.grad, b.grad)
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(mine.state[a][name], reference.state[b][name])


@pytest.mark.parametrize(("overrides", "passes"), [([], 0), (["optim=sgd", "optim.lr=0.1"], 10)])
def test_adam_clips_in_its_own_launch_and_others_in_a_pass_before(overrides, passes, tmp_path):
    settings = [*SMALL, *overrides, "optim.clip_grad=0.1", f"run.dir={tmp_path}"]
    assert run_ranks(clipping_passes, 1, settings) == [passes]


def clipping_passes(overrides: list[str]) -> int:
    """Count how often Megatron-Core's clipping reads the gradients."""
    from megatron.core.optimizer import clip_grads

    original, calls = clip_grads.multi_tensor_applier, []

    def counting(operation, *arguments):
        calls.append(operation is clip_grads.multi_tensor_scale_impl)
        return original(operation, *arguments)

    clip_grads.multi_tensor_applier = counting
    try:
        ranks.train(overrides)
    finally:
        clip_grads.multi_tensor_applier = original
    return sum(calls)


def test_base_lr_is_scaled_by_the_batch():
    config = compose(["optim.base_lr=1.5e-4", "train.global_batch=4096"])
    assert config.optim.lr is None
    assert config.optim.peak_lr(4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=sgd", "optim.eps=1e-8"], "optim.eps=1e-08 would be ignored by optim.name=sgd"),
        (["optim.momentum=0.9"], "optim.momentum=0.9 would be ignored by optim.name=adamw"),
        (["optim.betas=[0.9]"], "must be two numbers"),
        (["optim.lr=1e-3", "optim.base_lr=1e-3"], "set one of optim.lr"),
        (["optim.schedule=constant", "optim.min_lr=1e-5"], "would be ignored by optim.schedule=constant"),
        (["optim.schedule=wsd"], "wsd needs the number of steps"),
        (["optim.decay_steps=5"], "the other schedules need null"),
        (
            ["optim.schedule=wsd", "optim.decay_steps=1450", "optim.warmup_steps=100"],
            r"100 \+ optim.decay_steps=1450 = 1550 is more than",
        ),
        (["optim=sgd", "optim.lr=1", "optim.implementation=te"], "would be ignored by optim.name=sgd"),
        (["optim.min_lr=1"], "optim.min_lr=1.0 is above the peak learning rate"),
    ],
)
def test_settings_that_contradict_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(compose(overrides), 1)


@pytest.mark.parametrize("implementation", ["apex", "te"])
def test_another_fused_adam_is_named_when_missing(implementation):
    pytest.importorskip("megatron.core")
    with pytest.raises(AssertionError, match=f"ConfigError: optim.implementation={implementation} is not installed"):
        run_ranks(ranks.train, 1, [*SMALL, f"optim.implementation={implementation}"])
