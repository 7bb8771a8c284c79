"""Parallel linears that multiply 8-bit numbers (FP8) with torch; all other operations stay in bf16.

Weights and inputs are rounded to e4m3 (3 bits of mantissa, up to 448), the output's gradients to e5m2 (2 bits, up to
57344). Each operand of each product has its own scale, computed from its current largest value. There is no history of
scales, so a checkpoint holds none.

A scale is a power of two. The choice of the power changes only the rounding of values below 2⁻¹³ of the largest, so
each rank of a tensor-parallel group scales its part without communication.

The backward pass saves bf16 tensors and rounds them again: it needs as much memory as without FP8, and recompute frees
it.

Shapes: R rows (images and tokens), I inputs, O outputs of a product; C any number of columns.

Source: arXiv 2209.05433, section 3, for the format of each operand.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megavit.errors import ConfigError

# The exponent e of each format's largest number, 1.75 · 2ᵉ.
_LARGEST_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
# cuBLAS needs inner dims that are multiples of this.
_MULTIPLE = 16


def require_fp8(device: torch.device) -> None:
    """Raise ConfigError on a GPU that cannot multiply 8-bit numbers."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ConfigError(
            f"model.linear_backend=fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper), and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; set model.linear_backend=local"
        )


class Fp8Column(ColumnParallelLinear):
    """Megatron-Core's column-parallel linear with FP8 products."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if self.tp_group.size() > 1 and not self.sequence_parallel:
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        gathers = self.tp_group if self.sequence_parallel else None
        return _Product.apply(input_, self.weight, self.bias, gathers), None


class Fp8Row(RowParallelLinear):
    """Megatron-Core's row-parallel linear with FP8 products."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if self.tp_group.size() == 1:
            return _Product.apply(input_, self.weight, self.bias, None), None
        part = _Product.apply(input_, self.weight, None, None)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(part, group=self.tp_group) + self.bias, None
        return reduce_from_tensor_model_parallel_region(part, group=self.tp_group) + self.bias, None


def scale_of(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the smallest power of two s such that x / s fits a format; NaN if x is not finite.

    The computation uses the bits of an fp32 number, so that every device gives the same result.

    Args:
        x: tensor of any shape.
        dtype: an 8-bit format.

    Returns:
        One fp32 number from 2⁻¹²⁶ to 2¹²⁶.
    """
    largest = torch.linalg.vector_norm(x, ord=torch.inf).float()
    # A value above 1.75 · 2ᵉ carries over to the next exponent.
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 127
    # An infinity may round to 448 in e4m3, so the scale must become NaN.
    return _power_of_two(exponent - _LARGEST_EXPONENT[dtype]) + 0 * largest


def rounded(x: Tensor, *, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x / scale in an 8-bit format."""
    # The division is exact in bf16, because the scale is a power of two, so x is rounded once.
    return (x * scale.reciprocal()).to(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent.clamp(-126, 126) + 127) << 23).view(torch.float32)


def _across(numbers_RC: Tensor) -> Tensor:
    """Return the transpose, contiguous and padded with zeros to a multiple of 16 columns."""
    bits_CR = numbers_RC.view(torch.uint8).t()
    return F.pad(bits_CR, (0, -bits_CR.shape[1] % _MULTIPLE)).contiguous().view(numbers_RC.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ + b and its gradients; under sequence parallelism each pass gathers the tokens of all ranks again.

    `torch._scaled_mm` needs its first operand in row-major and its second in column-major order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, gathers: Any) -> Tensor:
        full = x if gathers is None else gather_from_sequence_parallel_region(x, group=gathers)
        x_scale, weight_scale = (scale_of(operand, dtype=torch.float8_e4m3fn) for operand in (full, weight_OI))
        ctx.save_for_backward(x, weight_OI, x_scale, weight_scale)
        ctx.gathers = gathers
        output_RO = torch._scaled_mm(
            rounded(full.flatten(0, -2).contiguous(), scale=x_scale, dtype=torch.float8_e4m3fn),
            rounded(weight_OI, scale=weight_scale, dtype=torch.float8_e4m3fn).t(),
            scale_a=x_scale,
            scale_b=weight_scale,
            bias=bias_O,
            out_dtype=x.dtype,
        )
        return output_RO.view(*full.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = gradients
        x, weight_OI, x_scale, weight_scale = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_RO = grad.flatten(0, -2).contiguous()
        grad_scale = scale_of(grad_RO, dtype=torch.float8_e5m2)
        rounded_grad_RO = rounded(grad_RO, scale=grad_scale, dtype=torch.float8_e5m2)
        of_x = of_weight = None
        if wants_x:
            of_x_RI = torch._scaled_mm(
                rounded_grad_RO,
                _across(rounded(weight_OI, scale=weight_scale, dtype=torch.float8_e4m3fn)).t(),
                scale_a=grad_scale,
                scale_b=weight_scale,
                out_dtype=grad.dtype,
            )
            of_x = of_x_RI.view(*grad.shape[:-1], -1)
            if ctx.gathers is not None:
                of_x = reduce_scatter_to_sequence_parallel_region(of_x, group=ctx.gathers)
        if wants_weight:
            full = x if ctx.gathers is None else gather_from_sequence_parallel_region(x, group=ctx.gathers)
            x_RI = full.flatten(0, -2)
            of_weight = torch._scaled_mm(
                _across(rounded_grad_RO),
                _across(rounded(x_RI, scale=x_scale, dtype=torch.float8_e4m3fn)).t(),
                scale_a=grad_scale,
                scale_b=x_scale,
                out_dtype=grad.dtype,
            )
        return of_x, of_weight, grad_RO.sum(dim=0) if wants_bias else None, None
