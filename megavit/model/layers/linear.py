"""The parallel linears of the encoder layer: Megatron-Core's own, with oneDNN's or FP8 products, or TE's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megavit.errors import ConfigError
from megavit.model.config import LinearBackend
from megavit.model.layers.accumulate import accumulating_linear
from megavit.model.layers.linear_fp8 import Fp8Column, Fp8Row, require_fp8
from megavit.model.layers.linear_onednn import OneDnnColumn, OneDnnRow, require_onednn


def parallel_linears(linears: LinearBackend, *, device: torch.device) -> tuple[type, type]:
    """The column-parallel and the row-parallel class.

    Args:
        linears: whose.
        device: where they will run.

    Raises:
        ConfigError: if they cannot run here.
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
    """Apply a parallel linear, its bias included.

    Megatron-Core's own is one fused product at tensor-parallel size 1: its autograd functions exist for communication
    that is not there, and each breaks a compiled graph (0.16.1).
    """
    if type(linear) in (ColumnParallelLinear, RowParallelLinear) and linear.tp_group.size() == 1:
        if getattr(linear.weight, "accumulates", False):
            return accumulating_linear(x, linear.weight, linear.bias)
        return F.linear(x, linear.weight, linear.bias)
    return linear(x)[0]
