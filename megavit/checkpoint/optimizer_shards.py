"""Save and load the distributed optimizer's state per parameter, on the data-parallel rank with the largest part of it.

To save the state, Megatron-Core 0.16.1 gathers all of it on every data-parallel rank, or on the first one over gloo; to
load it, every rank reads all of it: several times 12 bytes per parameter in each rank's host memory. But a rank holds a
range of complete parameters and a piece of one at either end, so only those pieces have to be sent. Keys and shapes
follow Megatron-Core's `fully_reshardable` format, and each implementation reads the other's files.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megavit.parallel.megatron_patches import replace_shards

_FORM = "fully_reshardable"
_PREFIX = "optimizer.state"
_STATES = ("param", "exp_avg", "exp_avg_sq")


def use_per_rank_shards(optimizer: MegatronOptimizer) -> None:
    """Make Megatron-Core's distributed optimizers save and load with this module."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            replace_shards(part, save=partial(_sharded_state, part), load=partial(_load, part))


@dataclass(frozen=True)
class _Piece:
    """The elements `start` to `stop` of a flat parameter, held by one data-parallel rank."""

    rank: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Share:
    """The ranks that hold a parameter's state, and the rank that writes it.

    Args:
        pieces: the pieces in order; together they are the complete parameter.
        me: this data-parallel rank.
    """

    def __init__(self, pieces: list[_Piece], me: int) -> None:
        self.pieces, self.writer = pieces, max(pieces, key=lambda piece: piece.size).rank
        self.is_written_here = self.writer == me
        self.local = next((piece for piece in pieces if piece.rank == me), None)


def _shares(part: DistributedOptimizer) -> dict[Parameter, _Share]:
    """Return each parameter's share, in the order of the gradient buffers; the same on every data-parallel rank."""
    ranks, me = part.data_parallel_group.size(), part.data_parallel_group.rank()
    shares = {}
    for buffer in part.buffers:
        for parameter, (start, stop, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            # Megatron-Core splits each bucket evenly, regardless of parameter boundaries.
            each = bucket.grad_data.numel() // ranks
            pieces = []
            for rank in range((start - bucket.offset) // each, (stop - 1 - bucket.offset) // each + 1):
                cut = bucket.offset + rank * each
                pieces.append(_Piece(rank, max(start, cut) - start, min(stop, cut + each) - start))
            shares[parameter] = _Share(pieces, me)
    return shares


def _sharded_state(
    part: DistributedOptimizer, weights: Mapping[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[str, Any]:
    """Replace Megatron-Core's `sharded_state_dict`, which would also collect garbage, 0.3 s per save."""
    if is_loading:
        # Before the first step there is no state to load into; this creates it.
        part.load_state_dict(part.state_dict())
    common = part.state_dict()
    if not is_loading:
        updates = _count_updates(part)
        for group in common["optimizer"]["param_groups"]:
            group["step"] = updates
    return {
        **common,
        "param_state": _by_parameter(part, weights, is_loading=is_loading),
        "param_state_sharding_type": _FORM,
    }


def _count_updates(part: DistributedOptimizer) -> int:
    """Return Adam's count of updates, from the ranks that train weights; every rank calls this.

    A checkpoint holds the first rank's parameter groups, and that rank counts no updates if its stages are frozen.
    """
    counts = {int(group["step"]) for group in part.optimizer.param_groups if group["params"]}
    extremes = torch.tensor([max(counts, default=0), max((-count for count in counts), default=-sys.maxsize)])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    most, least = int(extremes[0]), -int(extremes[1])
    assert most == least, f"ranks have taken {least} to {most} updates"
    return most


def _by_parameter(
    part: DistributedOptimizer, weights: Mapping[str, Any], *, is_loading: bool
) -> dict[int, dict[str, ShardedTensor]]:
    """Return this rank's part of the parameters' state to write or read, by parameter number."""
    of_weights = {shard.data: shard for shard in nested_values(weights) if isinstance(shard, ShardedTensor)}
    shares = _shares(part)
    if is_loading:
        here = {parameter: share for parameter, share in shares.items() if share.local is not None}
        states = {parameter: _empty(parameter) for parameter in here}
    else:
        # A weight that is replicated over tensor-parallel ranks is written by one of them.
        written = {p: share for p, share in shares.items() if not any(of_weights[p].replica_id[:-1])}
        states = _gather(part, written)
    numbers = {parameter: number for number, parameter in enumerate(shares)}
    return {
        numbers[parameter]: {
            name: _like(of_weights[parameter], name, state, is_main=shares[parameter].is_written_here)
            for name, state in of_parameter.items()
        }
        for parameter, of_parameter in states.items()
    }


def _like(weight: ShardedTensor, name: str, state: Tensor, *, is_main: bool) -> ShardedTensor:
    """Return the shard of a parameter's state, with the parameter's own split."""
    return replace(
        weight,
        key=f"{_PREFIX}.{name}.{weight.key}",
        data=state.view(weight.data.shape),
        dtype=state.dtype,
        replica_id=(*weight.replica_id[:-1], 0 if is_main else 1),
    )


def _empty(parameter: Parameter) -> dict[str, Tensor]:
    return {name: torch.empty(parameter.numel(), dtype=torch.float32) for name in _STATES}


def _gather(part: DistributedOptimizer, shares: Mapping[Parameter, _Share]) -> dict[Parameter, dict[str, Tensor]]:
    """Return the full flat state of each parameter that this rank writes; copy nothing that this rank holds in full."""
    travelling = {parameter: share for parameter, share in shares.items() if len(share.pieces) > 1}
    arrived = _exchange(part, travelling)
    gathered = {}
    for parameter, share in shares.items():
        if not share.is_written_here:
            continue
        local = _local_part(part, parameter)
        if parameter in travelling:
            assert share.local is not None
            full = _empty(parameter)
            for name in _STATES:
                full[name][share.local.start : share.local.stop].copy_(local[name])
            for piece in share.pieces:
                for name in _STATES if piece != share.local else ():
                    full[name][piece.start : piece.stop] = arrived[piece.rank].pop(0)
            local = full
        gathered[parameter] = local
    return gathered


def _exchange(part: DistributedOptimizer, shares: Mapping[Parameter, _Share]) -> dict[int, list[Tensor]]:
    """Send this rank's pieces to the ranks that write them; return what each rank sent, in buffer order."""
    group, ranks = part.data_parallel_group_gloo, dist.get_process_group_ranks(part.data_parallel_group_gloo)
    outgoing: dict[int, list[Tensor]] = {}
    lengths: dict[int, list[int]] = {}
    for parameter, share in shares.items():
        if share.is_written_here:
            for piece in share.pieces:
                if piece != share.local:
                    lengths.setdefault(piece.rank, []).extend([piece.size] * len(_STATES))
        elif share.local is not None:
            local = _local_part(part, parameter)
            outgoing.setdefault(share.writer, []).extend(local[name].cpu() for name in _STATES)
    incoming = {rank: torch.empty(sum(parts), dtype=torch.float32) for rank, parts in lengths.items()}
    messages = {rank: torch.cat(parts) for rank, parts in outgoing.items()}
    transfers = [dist.irecv(buffer, src=ranks[rank], group=group) for rank, buffer in incoming.items()]
    transfers += [dist.isend(message, dst=ranks[rank], group=group) for rank, message in messages.items()]
    for transfer in transfers:
        assert transfer is not None
        transfer.wait()
    return {rank: list(buffer.split(lengths[rank])) for rank, buffer in incoming.items()}


def _local_part(part: DistributedOptimizer, parameter: Parameter) -> dict[str, Tensor]:
    """Return this rank's piece of each tensor of a parameter's state, as flat views."""
    found = part._get_main_param_and_optimizer_states(parameter)
    local = {name: found[name].detach().view(-1) for name in _STATES}
    assert all(state.dtype == torch.float32 for state in local.values()), "master weights and moments are fp32"
    return local


@torch.no_grad()
def _load(part: DistributedOptimizer, loaded: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Copy this rank's pieces from the tensors that were read."""
    for number, (parameter, share) in enumerate(_shares(part).items()):
        if share.local is not None:
            local = slice(share.local.start, share.local.stop)
            states = {name: full.view(-1)[local] for name, full in loaded[number].items()}
            part._set_main_param_and_optimizer_states(parameter, states)
