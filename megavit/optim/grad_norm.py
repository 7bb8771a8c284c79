"""Gradient norm and scaling in a handful of launches and without waiting for the device.

Without Transformer Engine and apex, Megatron-Core 0.16.1 reads the norm of every single gradient back to the host.
"""

from typing import Any

import torch
from torch import Tensor


def offer_to_megatron() -> None:
    """Put these where Megatron-Core would have put apex's, unless apex's or Transformer Engine's are there."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
        clip_grads.multi_tensor_scale_impl = _scale


def _l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    (tensors,) = tensor_lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).reshape(1), None


def _scale(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    sources, targets = tensor_lists
    assert all(source is target for source, target in zip(sources, targets, strict=True)), "clipping works in place"
    torch._foreach_mul_(targets, factor)
