"""Parallel linears that compute fp32 products with oneDNN on CPUs.

torch computes fp32 products with MKL, which uses no more than AVX2 on AMD processors. On two Zen 5 cores with the
shapes of ViT-B/16, MKL reached 210 GFLOP/s and oneDNN, which torch contains, 300 to 475 (torch 2.15; docs/log.md of
2026-11-21).

Shapes: R rows (images and tokens), I inputs, O outputs of a product.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megavit.errors import ConfigError


def require_onednn(device: torch.device) -> None:
    """Raise ConfigError if the device is no CPU or this torch lacks oneDNN."""
    way_out = "set model.linear_backend=local"
    if device.type != "cpu":
        raise ConfigError(f"model.linear_backend=onednn is for CPUs and this run is on {device.type}; {way_out}")
    if not torch.backends.mkldnn.is_available():
        raise ConfigError(f"model.linear_backend=onednn: this torch was built without oneDNN; {way_out}")


class OneDnnColumn(ColumnParallelLinear):
    """Megatron-Core's column-parallel linear with oneDNN's product."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if self.tp_group.size() > 1:
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return _Product.apply(input_, self.weight, self.bias), None


class OneDnnRow(RowParallelLinear):
    """Megatron-Core's row-parallel linear with oneDNN's product."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if self.tp_group.size() == 1:
            return _Product.apply(input_, self.weight, self.bias), None
        part = _Product.apply(input_, self.weight, None)
        return reduce_from_tensor_model_parallel_region(part, group=self.tp_group) + self.bias, None


# A custom operator hides oneDNN's from torch.compile, which would lower it itself and require frozen weights (2.15).
@torch.library.custom_op("megavit::onednn_product", mutates_args=())
def onednn_product(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return rows Wᵀ + b; the operator defines no gradients."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight_OI, bias_O, "none", [], "")


@onednn_product.register_fake
def _(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight_OI.shape[0])


class _Product(torch.autograd.Function):
    """x Wᵀ + b and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return onednn_product(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = gradients
        x, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_RO = grad.flatten(0, -2)
        of_weight = onednn_product(grad_RO.t(), x.flatten(0, -2).t()) if wants_weight else None
        of_bias = grad_RO.sum(dim=0) if wants_bias else None
        return onednn_product(grad, weight_OI.t()) if wants_x else None, of_weight, of_bias
