"""Weight gradients multiplied straight into the buffer in which a step's gradients lie (optim/data_parallel.py).

Otherwise each is a tensor of its own first, that is allocated, written, read, and written or added there. A weight that
does so `accumulates`; its buffer is `main_grad`, and `is_grad_stale` while an earlier step's gradient is in it.

Shapes: R rows (images and tokens), I inputs, O outputs of a product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulating_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Give x Wᵀ + b, of a weight that accumulates; x of any shape, its last dim I."""
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
    """Add to a weight's buffer; what autograd gets in place of a gradient costs nothing, and nobody reads it."""
    buffer_OI, beta = weight_OI.main_grad, 0 if weight_OI.is_grad_stale else 1
    weight_OI.grad_added_to_main_grad = True
    if buffer_OI.dtype == weight_OI.dtype:
        torch.addmm(buffer_OI, left_OR, right_RI, beta=beta, out=buffer_OI)
        return buffer_OI.view_as(buffer_OI)
    torch.addmm(buffer_OI, left_OR, right_RI, buffer_OI.dtype, beta=beta, out=buffer_OI)
    return torch.empty_like(weight_OI)
