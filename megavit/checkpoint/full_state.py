"""The whole model's weights, put together from every rank's part."""

import torch
import torch.distributed as dist
from torch import Tensor

from megavit.parallel.layout import ParallelLayout


def gather_full_state_dict(
    parameters: dict[str, torch.nn.Parameter], layout: ParallelLayout
) -> dict[str, Tensor] | None:
    """Bring the whole weights to the first rank, on the CPU; every rank calls this.

    Args:
        parameters: this stage's, by their names in the whole model.
        layout: this rank's place.

    Returns:
        The weights by name on rank 0, None elsewhere.
    """
    stage = {}
    for name, parameter in parameters.items():
        weight = parameter.detach()
        if getattr(parameter, "tensor_model_parallel", False) and layout.tp > 1:
            parts = [torch.empty_like(weight) for _ in range(layout.tp)]
            dist.all_gather(parts, weight.contiguous(), group=layout.groups.tp)
            weight = torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]
        # A copy: a view would be pickled with all that lies behind it, which for bf16 is every weight of the stage.
        stage[name] = weight.cpu().clone()
    if layout.tp_rank or layout.dp_rank:
        return None
    stages: list[dict[str, Tensor] | None] = [None] * layout.pp
    first = dist.get_global_rank(layout.groups.pp, 0)
    dist.gather_object(stage, stages if layout.pp_rank == 0 else None, dst=first, group=layout.groups.pp)
    if layout.pp_rank:
        return None
    return {name: weight for part in stages if part is not None for name, weight in part.items()}
