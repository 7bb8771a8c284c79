"""FP8 products: rounded to the formats, within their error of the exact products, and refused where they cannot run."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.errors import ConfigError
from tests.reference import SMALL

FP8 = ["train.precision=bf16_o2", "model.linear_backend=fp8"]
# Half a step of a normal number, relative to it: 3 and 2 bits of mantissa.
HALF_STEP = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}
# One shape has a number of rows that 16 does not divide: 197 tokens of 3 images.
SHAPES = [(3 * 197, 768, 3072), (3 * 197, 3072, 768), (17, 64, 48), (1, 16, 16)]


def operands(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    """Return tokens, a weight, a bias and an output gradient with the magnitudes they have in a network."""
    torch.manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
    sizes = 1, 0.02, 0.02, 1e-4
    return tuple(
        (size * torch.randn(shape, dtype=torch.float32)).bfloat16() for shape, size in zip(shapes, sizes, strict=True)
    )


def with_gradients(product, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return x Wᵀ + b, and the gradients of x, W and b."""
    *inputs, upstream = tensors
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = product(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, upstream)


def by_fp8(x, weight, bias):
    from megavit.model.layers.linear_fp8 import _Product

    return _Product.apply(x, weight, bias, None)


@pytest.mark.parametrize("dtype", HALF_STEP, ids=str)
@pytest.mark.parametrize("size", [1e-30, 3e-4, 1.0, 500.0, 1e30])
def test_each_number_is_rounded_to_the_nearest_and_the_scale_just_fits_the_largest(dtype, size):
    from megavit.model.layers.linear_fp8 import rounded, scale_of

    torch.manual_seed(0)
    x = (size * torch.randn(2000) * torch.logspace(-8, 0, 2000)).bfloat16()
    scale = scale_of(x, dtype=dtype)
    assert torch.frexp(scale).mantissa == 0.5
    assert scale * torch.finfo(dtype).max / 2 < x.abs().max() <= scale * torch.finfo(dtype).max
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    every = every[every.isfinite()] * scale.double()
    got = rounded(x, scale=scale, dtype=dtype).double() * scale
    nearest = (x.double()[:, None] - every).abs().amin(dim=1)
    assert torch.equal((x.double() - got).abs(), nearest)


@pytest.mark.parametrize("largest", [1.0, 1.75, 1.7578125, 448.0, 450.0])
def test_a_coarser_scale_rounds_all_but_the_smallest_to_the_same(largest):
    """Tensor-parallel ranks therefore need not agree on a scale."""
    from megavit.model.layers.linear_fp8 import rounded, scale_of

    x = largest * torch.cat([torch.linspace(-1, 1, 4001), torch.logspace(-8, -4, 100)]).bfloat16()
    dtype = torch.float8_e4m3fn
    own = scale_of(x, dtype=dtype)
    alike = [rounded(x, scale=scale, dtype=dtype).double() * scale for scale in (own, 8 * own)]
    large = x.abs() >= 8 * own * 2**-6
    assert 3900 < large.sum() < 4050
    assert torch.equal(*(values[large] for values in alike))
    assert not torch.equal(*alike)


def test_values_that_e4m3_cannot_represent_are_rounded():
    """From 16 to 32 it represents every second number: 17 is a tie that rounds to 16, 19 one that rounds to 20."""
    x = torch.tensor([[17.0, 19.0, 18.0, 16.0] * 4]).bfloat16()
    unit = torch.eye(16).bfloat16()
    assert by_fp8(x, unit, None).tolist() == [[16.0, 20.0, 18.0, 16.0] * 4]
    assert F.linear(x, unit).tolist() == x.tolist()
    # An output gradient is e5m2, which represents every fourth number from 16 to 32.
    _, of_x, *_ = with_gradients(by_fp8, x, unit, torch.zeros(16).bfloat16(), torch.full((1, 16), 18.0).bfloat16())
    assert of_x.tolist() == [[16.0] * 16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_gradients_are_within_the_error_of_their_formats(shape, figure):
    x, weight, bias, upstream = tensors = operands(*shape)
    exact = with_gradients(F.linear, *(tensor.double() for tensor in tensors))
    got, plain = with_gradients(by_fp8, *tensors), with_gradients(F.linear, *tensors)
    size = with_gradients(
        F.linear, *(tensor.double().abs() for tensor in (x, weight, torch.zeros_like(bias), upstream))
    )
    e4m3, e5m2 = HALF_STEP.values()
    shares = e4m3 + e4m3 + e4m3 * e4m3, *[e4m3 + e5m2 + e4m3 * e5m2] * 2
    # The largest difference that two rounded operands can make, and bf16's half step of the result; far below the
    # largest value steps do not shrink any more, hence the last part.
    for found, right, of_size, share in zip(got, exact, size, shares, strict=False):
        allowed = share * of_size + 2**-8 * right.abs() + 1e-3 * of_size.max()
        assert bool(((found - right).abs() <= allowed).all())
    error = [float((found - right).norm() / right.norm()) for found, right in zip(got, exact, strict=True)]
    bf16 = [float((found - right).norm() / right.norm()) for found, right in zip(plain, exact, strict=True)]
    figure(f"FP8 product {shape}: off by {error[0]:.4f}, gradients of x, W by {error[1]:.4f}, {error[2]:.4f} (norm)")
    # Measured over five seeds, relative to the norm: for 591 rows 0.0378 and 0.0591, and 0.0018 in bf16; for one row up
    # to 0.061 and 0.14.
    assert error[0] <= 0.08
    assert max(error[1:3]) <= 0.2
    if shape[0] > 100:
        assert 10 * bf16[0] < error[0] <= 0.04
        assert max(10 * bf16[1], 10 * bf16[2], 0.05) < min(error[1:3])
        assert max(error[1:3]) <= 0.065
    # Nothing rounds the bias.
    assert error[3] <= 2 * bf16[3] + 1e-6


def test_zeros_stay_zero_and_a_value_that_is_not_finite_stays_so():
    x, weight, bias, upstream = operands(17, 64, 48)
    zero = with_gradients(by_fp8, 0 * x, weight, 0 * bias, 0 * upstream)
    assert not any(bool(tensor.any()) for tensor in zero)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x[3, 5] = upstream[2, 7] = bad
        output, of_x, of_weight, _ = with_gradients(by_fp8, x, weight, bias, upstream)
        assert not any(bool(tensor.isfinite().any()) for tensor in (output, of_x, of_weight))


def test_frozen_weights_get_no_gradient():
    x, weight = torch.ones(5, 16).bfloat16().requires_grad_(), torch.ones(32, 16).bfloat16()
    by_fp8(x, weight, None).sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, torch.full((5, 16), 32.0).bfloat16())


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operands_have_the_layouts_and_sizes_that_cuda_accepts(shape, monkeypatch):
    """torch's meta kernel of the product on a GPU checks tensors without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megavit.model.layers.linear_fp8 import _across, _Product

    context = SimpleNamespace(needs_input_grad=(True, True, True, False))
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    rows, inputs, outputs = shape
    with FakeTensorMode():
        sizes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
        *tensors, upstream = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes)
        assert _Product.forward(context, *tensors, None).shape == upstream.shape
        gradients = _Product.backward(context, upstream)
        assert [gradient.shape for gradient in gradients[:3]] == [tensor.shape for tensor in tensors]
        assert gradients[0].device.type == "cuda"
        # The meta kernel does refuse rows without padding.
        assert _across(torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device="cuda")).shape[1] % 16 == 0
        if rows % 16:
            monkeypatch.setattr("megavit.model.layers.linear_fp8._MULTIPLE", 1)
            with pytest.raises(RuntimeError, match="to be divisible by 16"):
                _Product.backward(context, upstream)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.precision=fp32"], "set train.precision=bf16_o2 or model.linear_backend=local"),
        (["model.hidden_size=40"], r"model\.hidden_size=40 over parallel\.tp=1 is none: 40 mod 16 = 8; set model\.l"),
        (
            ["model.ffn_size=48", "parallel.tp=2"],
            r"model\.ffn_size=48 over parallel\.tp=2 is none: 48 mod 32 = 16; .*tp$",
        ),
    ],
)
def test_fp8_is_refused_with_settings_it_does_not_support(settings, says):
    config = compose([*SMALL, *FP8, *settings])
    with pytest.raises(ConfigError, match=says):
        validate(config, config.parallel.tp)


def test_fp8_refuses_a_decoder_of_unsupported_width():
    config = compose(["recipe=digits_mae", *FP8, "task.decoder_ffn_size=100"])
    with pytest.raises(ConfigError, match=r"task\.decoder_ffn_size=100 over parallel\.tp=1 is none: 100 mod 16 = 4"):
        validate(config, 1)


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_fp8_is_refused_on_a_gpu_without_eight_bit_products(capability, fits, monkeypatch):
    from megavit.model.layers.linear_fp8 import require_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    if fits:
        require_fp8(torch.device("cuda"))
        return
    with pytest.raises(
        ConfigError, match=r"capability 8\.9 or higher .* and A100 has 8\.0; set model\.linear_backend=local"
    ):
        require_fp8(torch.device("cuda"))
