"""Take an optimizer step if all gradients are finite."""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megavit.optim.fused_adam import FusedAdam
from megavit.parallel import megatron_patches


def step_if_finite(optimizer: MegatronOptimizer, model: list[DistributedDataParallel]) -> tuple[float, bool]:
    """Take a step unless a gradient on any rank is not finite; all ranks decide the same.

    The step waits for the device only here, to read the norm and the decision.

    Args:
        optimizer: the model's optimizer.
        model: this rank's stages, wrapped, their gradients reduced.

    Returns:
        The gradient norm before clipping, and whether the weights were updated.
    """
    with torch.no_grad():
        optimizer.prepare_grads()
        shares = model[0].tp_group.size() > 1
        bad = shares and _any_uncounted_not_finite(optimizer, next(model[0].parameters()).device)
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm) or bool(bad):
            return norm, False
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and not getattr(part, "is_stub_optimizer", False):
                _clip(part, parameters, norm)
        optimizer.step_with_ready_grads()
    return norm, True


def _clip(part: MegatronOptimizer, parameters: list[torch.nn.Parameter], norm: float) -> None:
    """Scale gradients of this norm down to the largest allowed norm before the update."""
    largest = part.config.clip_grad
    if isinstance(part.optimizer, FusedAdam):
        # The fused kernel scales while it reads. A separate pass over B/16's gradients takes a tenth of the time of
        # norm, clipping, update and copy to bf16 (two cores, norm above the largest).
        part.optimizer.divide_gradients_by(max(1.0, (norm + 1e-6) / largest))
    else:
        clip_grad_by_total_norm_fp32(parameters, max_norm=largest, total_norm=norm)


def _any_uncounted_not_finite(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """Return 1 if a gradient outside the norm is not finite on any rank, else 0; does not wait for the device.

    The norm takes weights that are the same on all tensor-parallel ranks from one of them only.
    """
    uncounted = []
    for part in optimizer.chained_optimizers:
        counted = {id(grad) for grad in part.get_main_grads_for_grad_norm()}
        grads = [parameter.grad for parameter in part.get_parameters()]
        uncounted += [grad for grad in grads if grad is not None and id(grad) not in counted]
    # A rank whose layers are all frozen has no gradients.
    sums = [grad.sum(dtype=torch.float32) for grad in uncounted] or [torch.zeros((), device=device)]
    bad = (~torch.isfinite(torch.stack(sums))).any().to(torch.int32)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad


def use_batched_norms() -> None:
    """Make Megatron-Core compute norms of gradients and scale them in a few launches, without waiting for the device.

    If Transformer Engine or apex is installed, its functions stay in use.
    """
    megatron_patches.replace_norm_functions(l2_norm=_l2_norm, scale=_scale)


def _l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    (tensors,) = tensor_lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).reshape(1), None


def _scale(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    sources, targets = tensor_lists
    assert all(source is target for source, target in zip(sources, targets, strict=True)), "clipping works in place"
    torch._foreach_mul_(targets, factor)
