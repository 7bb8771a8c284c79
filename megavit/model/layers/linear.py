"""Choose and apply the parallel linears of the encoder layer: Megatron-Core's, oneDNN, FP8 or Transformer Engine's.

Shapes: R rows (images and tokens), I inputs, O outputs of a product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megavit.errors import ConfigError
from megavit.model.config import LinearBackend
from megavit.model.layers.linear_fp8 import Fp8Column, Fp8Row, require_fp8
from megavit.model.layers.linear_onednn import OneDnnColumn, OneDnnRow, require_onednn


def parallel_linears(linears: LinearBackend, *, device: torch.device) -> tuple[type, type]:
    """Return the classes of the column-parallel and the row-parallel linear.

    Args:
        linears: the implementation.
        device: device of the tensors.

    Raises:
        ConfigError: if the implementation cannot run here.
    """
    if linears is LinearBackend.local:
        return ColumnParallelLinear, RowParallelLinear
    if linears is LinearBackend.onednn:
        require_onednn(device)
        return OneDnnColumn, OneDnnRow
    if linears is LinearBackend.fp8:
        require_fp8(device)
        return Fp8Column, Fp8Row
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ConfigError(
            "model.linear_backend=te needs Transformer Engine, which is not installed: pip install 'megavit[te]' on a "
            "machine with CUDA, or set model.linear_backend=local"
        )
    return te.TEColumnParallelLinear, te.TERowParallelLinear


def apply_linear(linear: Any, x: Tensor) -> Tensor:
    """Apply a parallel linear and its bias.

    At tensor-parallel size 1 Megatron-Core's own linear becomes one fused product: its autograd functions only serve
    communication, and each of them breaks a compiled graph (0.16.1).
    """
    if type(linear) in (ColumnParallelLinear, RowParallelLinear) and linear.tp_group.size() == 1:
        if getattr(linear.weight, "accumulates", False):
            return accumulating_linear(x, linear.weight, linear.bias)
        return F.linear(x, linear.weight, linear.bias)
    return linear(x)[0]


def accumulating_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + b; the backward pass adds the weight's gradient straight to the step's gradient buffer.

    This saves a temporary tensor per gradient, which would be allocated, written, read and added to the buffer.
    parallel/ddp.py marks such a weight with `accumulates`. Its buffer is `main_grad`; `is_grad_stale` is true while the
    buffer still holds an earlier step's gradient.

    Args:
        x: input of any shape whose last dim is I.
        weight_OI: weight marked with `accumulates`.
        bias_O: None for no bias.
    """
    return _Linear.apply(x, weight_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = gradients
        x, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_RO = grad.flatten(0, -2)
        of_weight = None
        if wants_weight:
            of_weight = _add_product(grad_RO.t(), x.flatten(0, -2), weight_OI)
        return grad @ weight_OI if wants_x else None, of_weight, grad_RO.sum(dim=0) if wants_bias else None


def _add_product(left_OR: Tensor, right_RI: Tensor, weight_OI: Any) -> Tensor:
    """Add a product to a weight's gradient buffer; return an unread placeholder as the gradient for autograd."""
    buffer_OI, beta = weight_OI.main_grad, 0 if weight_OI.is_grad_stale else 1
    weight_OI.grad_added_to_main_grad = True
    if buffer_OI.dtype == weight_OI.dtype:
        torch.addmm(buffer_OI, left_OR, right_RI, beta=beta, out=buffer_OI)
        return buffer_OI.view_as(buffer_OI)
    torch.addmm(buffer_OI, left_OR, right_RI, buffer_OI.dtype, beta=beta, out=buffer_OI)
    return torch.empty_like(weight_OI)
