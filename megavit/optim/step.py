"""One optimizer step, taken only if every gradient is a finite number."""

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor


def step_if_finite(optimizer: MegatronOptimizer, model: list[DistributedDataParallel]) -> tuple[float, bool]:
    """Step, unless some gradient of some rank is not finite; all ranks agree.

    The norm alone does not see everything: what the tensor-parallel ranks hold alike it takes from one of them.
    Reading norm and agreement back is the step's one wait for the device.

    Args:
        optimizer: of the model.
        model: this rank's stages, wrapped, their gradients reduced.

    Returns:
        The gradient norm before clipping, and whether the weights were updated.
    """
    with torch.no_grad():
        bad = _any_not_finite(model)
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm) or bool(bad):
            return norm, False
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and not getattr(part, "is_stub_optimizer", False):
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
    return norm, True


def _any_not_finite(model: list[DistributedDataParallel]) -> Tensor:
    """1 on every rank if a gradient of any rank is not finite, else 0; on the device, not waited for."""
    sums = [buffer.grad_data.sum(dtype=torch.float32) for chunk in model for buffer in chunk.buffers]
    # Where all its layers are frozen, a rank has nothing to sum.
    sums = sums or [torch.zeros((), device=next(model[0].parameters()).device)]
    bad = (~torch.isfinite(torch.stack(sums))).any().to(torch.int32)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad


def last_layer_not_finite(named: dict[str, torch.nn.Parameter]) -> str | None:
    """Of the parameters whose gradient is not finite, the one closest to the loss; None where all are finite.

    What is not finite spreads backwards from where it arose, towards the input.

    Args:
        named: parameters in the order of the forward pass, by their names in the whole model.
    """
    bad = None
    for name, parameter in named.items():
        gradient = getattr(parameter, "main_grad", None)
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            bad = name
    return bad
