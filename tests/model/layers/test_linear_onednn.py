"""oneDNN products: the same values and gradients as torch's, and refused where they are not supported."""

import pytest
import torch
import torch.nn.functional as F

from megavit.config.validate import validate
from megavit.errors import ConfigError
from tests.distributed import run_ranks
from tests.reference import SMALL


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(bias):
    from megavit.model.layers.linear_onednn import _Product

    torch.manual_seed(0)
    shapes = (3, 17, 48), (40, 48), (40,)
    x, weight, offset = (torch.randn(shape, dtype=torch.float32, requires_grad=True) for shape in shapes)
    offset = offset if bias else None
    inputs = [tensor for tensor in (x, weight, offset) if tensor is not None]
    upstream = torch.randn(3, 17, 40)
    wanted = [tensor.double().detach().requires_grad_() for tensor in inputs]
    expected = F.linear(*wanted)
    got = _Product.apply(x, weight, offset)
    pairs = zip(
        (got, *torch.autograd.grad(got, inputs, upstream)),
        (expected, *torch.autograd.grad(expected, wanted, upstream.double())),
        strict=True,
    )
    for found, right in pairs:
        # Measured: 7e-7 of the largest value.
        assert (found - right).abs().max() <= 3e-6 * right.abs().max()


def test_frozen_weights_get_no_gradient():
    from megavit.model.layers.linear_onednn import _Product

    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8)
    _Product.apply(x, weight, None).sum().backward()
    assert weight.grad is None
    assert torch.allclose(x.grad, weight.sum(dim=0).expand(5, 8))


def loss_with(overrides: list[str]) -> float:
    from tests import ranks

    return ranks.train(overrides)["losses"][-1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.precision=bf16_o2"], "is for fp32: torch itself gives bf16 products to oneDNN"),
        (["parallel.tp=2", "parallel.sequence_parallel=true", "model.class_tokens=8"], "does not split tokens"),
    ],
)
def test_onednn_is_refused_with_settings_it_does_not_support(settings, says):
    from megavit.config.compose import compose

    config = compose([*SMALL, "model.linear_backend=onednn", *settings])
    with pytest.raises(ConfigError, match=says):
        validate(config, config.parallel.tp)


def test_onednn_is_refused_on_a_gpu():
    from megavit.model.layers.linear_onednn import require_onednn

    with pytest.raises(ConfigError, match=r"for CPUs and this run is on cuda; set model\.linear_backend=local"):
        require_onednn(torch.device("cuda"))


@pytest.mark.slow
def test_compiled_onednn_layers_train_as_eager_ones(tmp_path):
    overrides = [*SMALL, "model.linear_backend=onednn"]
    plain = run_ranks(loss_with, 1, [*overrides, f"run.dir={tmp_path}/plain"])[0]
    compiled = run_ranks(loss_with, 1, [*overrides, "train.compile=layer", f"run.dir={tmp_path}/compiled"])[0]
    # Measured: 2.4e-7.
    assert compiled == pytest.approx(plain, abs=2e-6)
