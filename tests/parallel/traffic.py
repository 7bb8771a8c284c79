"""What a rank really sends: every call that reaches torch's process groups while a run goes on."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# All ways into a process group, by the words of torch.distributed. Whatever name a function was imported under, alone,
# as one of a batch or coalesced with others, it ends in one of these; a process group has the older names too.
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
        collective: what was done.
        ranks: global ranks of the group; of a `send` or `recv` the other rank alone.
        num_bytes: of the whole tensor: of the larger side, where what goes in and what comes out differ.
        dtype: of its values, None where nothing is sent.
    """

    collective: str
    ranks: tuple[int, ...]
    num_bytes: int
    dtype: torch.dtype | None


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record what this rank calls, in order."""
    calls: list[Call] = []

    def record(entry: str, function: Any) -> Any:
        def called(group: dist.ProcessGroup, *arguments: Any, **named: Any) -> Any:
            calls.append(_describe(entry, group, [*arguments, *named.values()]))
            return function(group, *arguments, **named)

        return called

    there = {entry: getattr(dist.ProcessGroup, entry) for entry in ENTRIES if hasattr(dist.ProcessGroup, entry)}
    # Not a patch of the functions: Megatron-Core has bound some of them at import, and under old names.
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
    """Count what gloo itself begins, beneath all of Python, by its name for it and the values this rank gives."""
    counter: Counter = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield counter
    # Not `profile.events()`, which takes ten times as long to build a tree of every operator.
    events = [event for event in profile.profiler.kineto_results.events() if event.name().startswith("gloo:")]
    counter.update((event.name(), prod(event.shapes()[0])) for event in events)


def as_gloo_counts(call: Call) -> tuple[str, int]:
    """What gloo counts for a call: it reduces the whole tensor where a part of the sum is asked for (torch 2.15)."""
    assert call.dtype is not None
    values = call.num_bytes // call.dtype.itemsize
    if call.collective == "all_gather":
        return "gloo:all_gather", values // len(call.ranks)
    return f"gloo:{'all_reduce' if call.collective == 'reduce_scatter' else call.collective}", values
