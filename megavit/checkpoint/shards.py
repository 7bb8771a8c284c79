"""Weights, optimizer state and averages as Megatron-Core's shards: written by every rank, read in any layout."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megavit.checkpoint.optimizer_shards import share_out
from megavit.checkpoint.safety import refuse_code

# Of Megatron-Core's forms of the distributed optimizer's state, the one that loads in every layout (0.16.1).
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}

# Before the keys of the weights' averages.
_AVERAGES = "average."

# By chunk and by the parameter's name within it.
Averages = Mapping[str, Mapping[str, Tensor]]

# What the checkpoint, not the configuration, decides in an optimizer's parameter group.
_FROM_CHECKPOINT = ("params", "step")

# How the keys of Megatron-Core's own objects end.
_OBJECTS = "_extra_state"


def load(
    checkpoint: Path,
    chunks: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer,
    *,
    averages: Averages | None = None,
) -> None:
    """Read a checkpoint of any layout into this one, in place; every rank calls this.

    Learning rate, weight decay and the like stay as configured: a checkpoint holds state, not settings.

    Args:
        checkpoint: a whole checkpoint of the same model.
        chunks: this rank's stages by name, unwrapped.
        optimizer: theirs.
        averages: where to put the weights' averages, if the checkpoint holds them and they are wanted.

    Raises:
        ConfigError: if it would run code.
    """
    settings = [
        {key: value for key, value in group.items() if key not in _FROM_CHECKPOINT} for group in optimizer.param_groups
    ]
    refuse_code(checkpoint)
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded_state(chunks, optimizer, averages, is_loading=True), str(checkpoint)
    )
    _fill(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for name, weights in (averages or {}).items():
        for key, weight in weights.items():
            weight.copy_(loaded["averages"][name][key])


def load_weights(checkpoint: Path, chunks: Mapping[str, MegatronModule]) -> None:
    """Read the weights alone, in place, in any layout; every rank calls this.

    Args:
        checkpoint: a whole checkpoint of the same model.
        chunks: this rank's stages by name.

    Raises:
        ConfigError: if it would run code.
    """
    refuse_code(checkpoint)
    state = {name: _sharded_weights(chunk) for name, chunk in chunks.items()}
    _fill(chunks, dist_checkpointing.load(state, str(checkpoint)))


def load_common_weights(checkpoint: Path, chunks: Mapping[str, MegatronModule]) -> tuple[list[str], list[str]]:
    """Read those weights that a checkpoint of another network shares with this one, in place; every rank calls this.

    Args:
        checkpoint: a whole checkpoint.
        chunks: this rank's stages by name.

    Returns:
        Of this rank, the keys that are not in the checkpoint, a classifier of other classes among them, and those of
        another shape there, with both shapes; if there are such, nothing is read.

    Raises:
        ConfigError: if it would run code.
    """
    there = refuse_code(checkpoint)
    absent, differ = [], []
    state: dict[str, dict[str, Any]] = {}
    for name, chunk in chunks.items():
        state[name] = {}
        for own, shard in _sharded_weights(chunk).items():
            is_other = there.get(shard.key) != tuple(shard.global_shape)
            if shard.key not in there or (is_other and shard.key.startswith("head.")):
                absent.append(shard.key)
            elif is_other:
                differ.append(f"{shard.key} is {list(there[shard.key])} there and {list(shard.global_shape)} here")
            else:
                state[name][own] = shard
    if not differ:
        loaded = dist_checkpointing.load(state, str(checkpoint))
        for name, chunk in chunks.items():
            chunk.load_state_dict(loaded.get(name, {}), strict=False)
    return absent, differ


def sharded_state(
    chunks: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer | None,
    averages: Averages | None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """All that a checkpoint holds of this rank, as Megatron-Core's shards."""
    state: dict[str, Any] = {name: _sharded_weights(chunk) for name, chunk in chunks.items()}
    if not is_loading:
        state = {name: _spread(shards) for name, shards in state.items()}
    if optimizer is not None:
        share_out(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(_SHARDING))
    if averages is not None:
        state["averages"] = {name: _spread(_sharded_averages(chunk, averages[name])) for name, chunk in chunks.items()}
    return state


def _sharded_weights(chunk: MegatronModule) -> dict[str, Any]:
    """A chunk's tensors; the objects that its linears would add are empty without FP8, and are read as pickles."""
    shards = chunk.sharded_state_dict(metadata=dict(_SHARDING))
    return {name: shard for name, shard in shards.items() if not name.endswith(_OBJECTS)}


def _spread(shards: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """Have the data-parallel ranks, which hold the same weights, write them in turn and not all by the first."""
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return {
        name: replace(shard, replica_id=(*shard.replica_id[:-1], (shard.replica_id[-1] + number) % ranks))
        for number, (name, shard) in enumerate(shards.items())
    }


def _fill(chunks: Mapping[str, MegatronModule], loaded: Mapping[str, Any]) -> None:
    for name, chunk in chunks.items():
        absent = {key: None for key in chunk.state_dict() if key.endswith(_OBJECTS)}
        chunk.load_state_dict({**loaded[name], **absent}, strict=True)


def _sharded_averages(chunk: MegatronModule, weights: Mapping[str, Tensor]) -> dict[str, ShardedTensor]:
    """A chunk's averages, sharded as its weights are, under keys of their own."""
    shards = chunk.sharded_state_dict(prefix=_AVERAGES, metadata=dict(_SHARDING))
    return {
        name: replace(shards[f"{_AVERAGES}{name}"], data=weight, dtype=weight.dtype) for name, weight in weights.items()
    }
