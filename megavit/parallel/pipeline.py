"""Run micro batches through the pipeline with Megatron-Core's schedules, and sum their metrics."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavit.parallel.activation import ActivationSpec
from megavit.parallel.layout import ParallelLayout

# Takes a batch and the model; returns the model's output and a function from the output to (loss, metric sums).
ForwardStep = Callable[[Any, torch.nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]]


def run_microbatches(
    forward_step: ForwardStep,
    chunks: list[torch.nn.Module],
    batches: Iterator[Any],
    *,
    num_microbatches: int,
    boundary: ActivationSpec,
    layout: ParallelLayout,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run one step's micro batches, 1F1B over the stages, then reduce the gradients over the data-parallel ranks.

    Args:
        forward_step: runs a stage on a micro batch.
        chunks: this rank's stages, wrapped.
        batches: this rank's micro batches, in order; if a rank holds several stages, those that embed the images or
            compute the loss read them and the others get None.
        num_microbatches: micro batches of this step per data-parallel rank.
        boundary: the tensors that a stage sends to the next.
        layout: this rank's layout.
        forward_only: whether to compute no gradients.

    Returns:
        The loss function's metric sums per micro batch; empty except on the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Any], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        return forward_step(next(iterator), chunk)

    if len(chunks) == 1:
        feeds: Any = batches
    else:
        feeds = [batches if _reads(chunk) else repeat(None) for chunk in chunks]
    first, described = boundary.tensors[0], {}
    if layout.pp > 1 and len(chunks) == 1:
        shapes = boundary.local_shapes(layout)
        described = {"adjust_tensor_shapes_fn": lambda received, sent: (shapes, shapes)}
    else:
        assert len(boundary.tensors) == 1, "an interleaved pipeline sends one tensor (Megatron-Core 0.16.1)"
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=feeds,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=first.shape[0],
        micro_batch_size=first.shape[1],
        forward_only=forward_only,
        **described,
    )


def _reads(chunk: torch.nn.Module) -> bool:
    from megatron.core.utils import unwrap_model

    stage = unwrap_model(chunk)
    return stage.pre_process or stage.post_process


def add_microbatches(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add the metric sums of this rank's micro batches; empty if there are none."""
    names = outputs[0] if outputs else {}
    return {name: torch.stack([output[name] for output in outputs]).sum(dim=0) for name in names}


def sum_over_world(
    sums: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], layout: ParallelLayout
) -> dict[str, Tensor]:
    """Add the metric sums of all data-parallel ranks, each image counted once; every rank gets the result.

    Args:
        sums: from `add_microbatches`; empty except on the last stage.
        shapes: shapes of the sums by name, the same on every rank; () for a number.
        layout: this rank's layout.

    Returns:
        The totals by name, float64 on the CPU.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    values = torch.zeros(sum(sizes), dtype=torch.float64, device=layout.device)
    if layout.holds_last_stage and layout.tp_rank == 0:
        values = torch.cat([sums[name].double().flatten() for name in shapes])
    dist.all_reduce(values)
    parts = zip(shapes.items(), values.cpu().split(sizes), strict=True)
    return {name: part.view(shape) for (name, shape), part in parts}
