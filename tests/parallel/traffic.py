"""Record every call of a rank that reaches torch's process groups during a run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# All methods of a process group, with their names in torch.distributed. Every function of torch.distributed, single,
# in a batch or coalesced, calls one of these, under whatever name it was imported; some are older names.
ENTRIES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
    "reduce": "reduce",
    "gather": "gather",
    "gather_single": "gather",
    "gather_into_tensor": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
}


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        collective: the operation.
        ranks: global ranks of the group; for a `send` or `recv` only the other rank.
        num_bytes: bytes of the full tensor: the larger one of input and output.
        dtype: number format of the values; None if nothing is sent.
    """

    collective: str
    ranks: tuple[int, ...]
    num_bytes: int
    dtype: torch.dtype | None


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record this rank's calls, in order."""
    calls: list[Call] = []

    def record(entry: str, function: Any) -> Any:
        def called(group: dist.ProcessGroup, *arguments: Any, **named: Any) -> Any:
            calls.append(_describe(entry, group, [*arguments, *named.values()]))
            return function(group, *arguments, **named)

        return called

    there = {entry: getattr(dist.ProcessGroup, entry) for entry in ENTRIES if hasattr(dist.ProcessGroup, entry)}
    # Patch the group's methods, not the functions, some of which Megatron-Core has imported under old names.
    with mock.patch.multiple(dist.ProcessGroup, **{entry: record(entry, there[entry]) for entry in there}):
        yield calls


def _describe(entry: str, group: dist.ProcessGroup, arguments: list[Any]) -> Call:
    ranks = tuple(dist.get_process_group_ranks(group))
    if entry in ("send", "recv"):
        ranks = (ranks[arguments[1]],)
    sides = [side for side in map(_tensors, arguments) if side]
    sizes = [sum(tensor.nbytes for tensor in side) for side in sides]
    return Call(ENTRIES[entry], ranks, max(sizes, default=0), sides[0][0].dtype if sides else None)


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)] if isinstance(argument, list) else []


@contextmanager
def counted_by_gloo() -> Iterator[Counter]:
    """Count the operations that gloo itself starts, by its name for them and this rank's number of values."""
    counter: Counter = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield counter
    # Not `profile.events()`, which takes ten times as long to build a tree of every operator.
    events = [event for event in profile.profiler.kineto_results.events() if event.name().startswith("gloo:")]
    counter.update((event.name(), prod(event.shapes()[0])) for event in events)


def as_gloo_counts(call: Call) -> tuple[str, int]:
    """Return gloo's count for a call; for a reduce-scatter gloo reduces the full tensor (torch 2.15)."""
    assert call.dtype is not None
    values = call.num_bytes // call.dtype.itemsize
    if call.collective == "all_gather":
        return "gloo:all_gather", values // len(call.ranks)
    return f"gloo:{'all_reduce' if call.collective == 'reduce_scatter' else call.collective}", values
