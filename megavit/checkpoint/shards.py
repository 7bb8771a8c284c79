"""Save and load weights, optimizer state and moving averages as Megatron-Core's shards, in any layout."""

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megavit.checkpoint.optimizer_shards import use_per_rank_shards
from megavit.checkpoint.safe_pickle import check_pickles
from megavit.errors import ConfigError
from megavit.parallel.collectives import gather_objects
from megavit.parallel.layout import ParallelLayout

# Megatron-Core's only format of the distributed optimizer's state that loads in every layout (0.16.1).
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}

# Prefix of the keys of the moving averages.
_AVERAGES = "average."

# Moving averages by chunk and by the parameter's name within it.
Averages = Mapping[str, Mapping[str, Tensor]]

# Entries of an optimizer's parameter group that come from the checkpoint, not from the configuration.
_FROM_CHECKPOINT = ("params", "step")

# Suffix of the keys of Megatron-Core's own objects.
_OBJECTS = "_extra_state"


def load(
    checkpoint: Path,
    chunks: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer,
    *,
    averages: Averages | None = None,
) -> None:
    """Load a checkpoint of any layout in place; every rank calls this.

    Learning rate, weight decay and similar settings stay as configured: a checkpoint holds state, not settings.

    Args:
        checkpoint: a valid checkpoint of the same model.
        chunks: this rank's stages by name, unwrapped.
        optimizer: the optimizer of these stages.
        averages: tensors for the moving averages, if the checkpoint holds them; None to load none.

    Raises:
        ConfigError: if the checkpoint's files would run code.
    """
    settings = [
        {key: value for key, value in group.items() if key not in _FROM_CHECKPOINT} for group in optimizer.param_groups
    ]
    check_pickles(checkpoint)
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded_state(chunks, optimizer, averages, is_loading=True), str(checkpoint)
    )
    _fill(chunks, loaded)
    if not isinstance(optimizer.chained_optimizers[0], DistributedOptimizer):
        _add_nothing(loaded["optimizer"])
    optimizer.load_state_dict(loaded["optimizer"])
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for name, weights in (averages or {}).items():
        for key, weight in weights.items():
            weight.copy_(loaded["averages"][name][key])


def _add_nothing(state: dict[str, Any]) -> None:
    """Add the empty entries that Megatron-Core omits for a rank that trains nothing (0.16.1)."""
    if "optimizer" in state:
        state.setdefault("fp32_from_fp16_params", [[] for _ in state["optimizer"]["param_groups"]])
    state.get("optimizer", state).setdefault("state", {})


def load_weights(checkpoint: Path, chunks: Mapping[str, MegatronModule], *, averaged: bool = False) -> None:
    """Load only the weights in place, in any layout; every rank calls this.

    Args:
        checkpoint: a valid checkpoint of the same model.
        chunks: this rank's stages by name.
        averaged: load the moving averages instead.

    Raises:
        ConfigError: if the checkpoint's files would run code, or it holds no average.
    """
    there = check_pickles(checkpoint)
    state = {name: _as_saved(_sharded_weights(chunk), there, averaged=averaged) for name, chunk in chunks.items()}
    if averaged:
        _refuse_without_average(checkpoint, there)
    _fill(chunks, dist_checkpointing.load(state, str(checkpoint)))


def _refuse_without_average(checkpoint: Path, there: Mapping[str, tuple[int, ...]]) -> None:
    if not any(key.startswith(_AVERAGES) for key in there):
        raise ConfigError(
            f"{checkpoint} holds no moving average of its weights: its run had optim.ema=null; remove ema:"
        )


def _as_saved(
    shards: dict[str, ShardedTensor], there: Mapping[str, tuple[int, ...]], *, averaged: bool
) -> dict[str, ShardedTensor]:
    """Return the shards with the keys and the fp32 type of the averages; a weight without an average is unchanged."""
    if not averaged:
        return shards
    return {
        name: replace(shard, key=f"{_AVERAGES}{shard.key}", data=shard.data.float(), dtype=torch.float32)
        if f"{_AVERAGES}{shard.key}" in there
        else shard
        for name, shard in shards.items()
    }


def shapes_of(
    checkpoint: Path, chunks: Mapping[str, MegatronModule], *, averaged: bool = False
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the full shapes of a checkpoint's weights, and of this rank's weights.

    Args:
        checkpoint: a valid checkpoint, of any network.
        chunks: this rank's stages by name.
        averaged: take the moving averages in the checkpoint.

    Returns:
        Both by the weight's name in the full model.

    Raises:
        ConfigError: if the checkpoint's files would run code, or it holds no average.
    """
    there = check_pickles(checkpoint)
    if averaged:
        _refuse_without_average(checkpoint, there)
        there = {key.removeprefix(_AVERAGES): shape for key, shape in there.items() if key.startswith(_AVERAGES)}
    here = {
        shard.key: tuple(shard.global_shape) for chunk in chunks.values() for shard in _sharded_weights(chunk).values()
    }
    return there, here


def load_some_weights(
    checkpoint: Path,
    chunks: Mapping[str, MegatronModule],
    names: Container[str],
    *,
    full: Mapping[str, tuple[int, ...]],
    averaged: bool = False,
) -> dict[str, Tensor]:
    """Load some weights of another network's checkpoint in place, and others as full tensors; every rank calls this.

    Args:
        checkpoint: a valid checkpoint.
        chunks: this rank's stages by name.
        names: full-model names of the weights to load in place; their shapes are the same in the checkpoint.
        full: names and shapes of the weights to return unsplit.
        averaged: load the moving averages instead.

    Returns:
        The weights of `full`, in fp32.
    """
    there = check_pickles(checkpoint)
    state: dict[str, dict[str, Any]] = {}
    for name, chunk in chunks.items():
        wanted = {local: shard for local, shard in _sharded_weights(chunk).items() if shard.key in names}
        state[name] = _as_saved(wanted, there, averaged=averaged)
    prefix = _AVERAGES if averaged else ""
    state["whole"] = {
        key: ShardedTensor.from_rank_offsets(f"{prefix}{key}", torch.empty(shape), replica_id=dist.get_rank())
        for key, shape in full.items()
    }
    loaded = dist_checkpointing.load(state, str(checkpoint))
    for name, chunk in chunks.items():
        chunk.load_state_dict(loaded.get(name, {}), strict=False)
    return loaded.get("whole", {})


def sharded_state(
    chunks: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer | None,
    averages: Averages | None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Return this rank's part of a checkpoint, as Megatron-Core's shards."""
    state: dict[str, Any] = {name: _sharded_weights(chunk) for name, chunk in chunks.items()}
    if not is_loading:
        state = {name: _rotate_writers(shards) for name, shards in state.items()}
    if optimizer is not None:
        use_per_rank_shards(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(_SHARDING))
        if not is_loading and not isinstance(optimizer.chained_optimizers[0], DistributedOptimizer):
            _share_count(state["optimizer"])
        if not any(group["params"] for group in optimizer.param_groups):
            # The first rank's empty lists would be kept, and merged with another layout's non-empty lists (0.16.1).
            state["optimizer"].pop("fp32_from_fp16_params", None)
    if averages is not None:
        state["averages"] = {
            name: _rotate_writers(_sharded_averages(chunk, averages[name])) for name, chunk in chunks.items()
        }
    return state


def _share_count(state: dict[str, Any]) -> None:
    """Set a plug-in's count of updates from the ranks that train weights; every rank calls this.

    A checkpoint holds the first rank's common part, and that rank has no count if its stages are frozen.
    """
    of_weights = state.get("optimizer", state)["state"]
    mine = of_weights.get("common_step")
    counts = [count for count in gather_objects(mine.cpu() if torch.is_tensor(mine) else mine) if count is not None]
    if counts:
        assert all(count == counts[0] for count in counts), f"ranks have taken {min(counts)} to {max(counts)} updates"
        of_weights["common_step"] = counts[0]


def _sharded_weights(chunk: MegatronModule) -> dict[str, Any]:
    """Return a chunk's tensors, without its linears' extra objects (empty without FP8, and stored as pickles)."""
    shards = chunk.sharded_state_dict(metadata=dict(_SHARDING))
    return {name: shard for name, shard in shards.items() if not name.endswith(_OBJECTS)}


def _rotate_writers(shards: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """Distribute the writing of replicated weights over the data-parallel ranks."""
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
    """Return a chunk's moving averages with the sharding of its weights, under separate keys."""
    shards = chunk.sharded_state_dict(prefix=_AVERAGES, metadata=dict(_SHARDING))
    return {
        name: replace(shards[f"{_AVERAGES}{name}"], data=weight, dtype=weight.dtype) for name, weight in weights.items()
    }


def gather_full_state_dict(
    parameters: dict[str, torch.nn.Parameter], layout: ParallelLayout
) -> dict[str, Tensor] | None:
    """Gather the full weights on the first rank, on the CPU; every rank calls this.

    Args:
        parameters: this stage's parameters, by their names in the full model.
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
        # Clone: a view would be pickled with its full storage, which for bf16 holds every weight of the stage.
        stage[name] = weight.cpu().clone()
    if layout.tp_rank or layout.dp_rank:
        return None
    stages: list[dict[str, Tensor] | None] = [None] * layout.pp
    first = dist.get_global_rank(layout.groups.pp, 0)
    dist.gather_object(stage, stages if layout.pp_rank == 0 else None, dst=first, group=layout.groups.pp)
    if layout.pp_rank:
        return None
    return {name: weight for part in stages if part is not None for name, weight in part.items()}
