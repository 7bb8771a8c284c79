"""Assign encoder layers to pipeline stages, and write the assignment in Megatron-Core's notation."""

from megavit.errors import ConfigError
from megavit.parallel.config import ParallelConfig, Recompute, RecomputeMethod
from megavit.planner.flops import NetworkShape, embedding_flops, head_flops, layer_flops
from megavit.planner.stage_balance import balance_layers


def plan_stages(config: ParallelConfig, shape: NetworkShape) -> list[int]:
    """Choose how many encoder layers each stage holds.

    Args:
        config: the parallel group; `parallel.stages`, or null to balance by FLOPs.
        shape: sizes of the network, for the cost of embedding and head.

    Returns:
        Layers of each of the pp · vpp stages, in the order of the layers: stage s is on pipeline rank s mod pp.

    Raises:
        ConfigError: if the layers do not fit the stages, or a recompute setting does not fit the layers.
    """
    stages = _given_stages(config, shape) if config.stages is not None else _balanced_stages(config, shape)
    _check_recompute(config, stages)
    return stages


def rank_stages(stages: list[int], config: ParallelConfig, pp_rank: int) -> list[int]:
    """Return the number of layers of each stage of one pipeline rank, in order."""
    return stages[pp_rank :: config.pp]


def megatron_layout(stages: list[int]) -> str:
    """Return the stages in the notation of Megatron-Core's `pipeline_model_parallel_layout`: [3, 5] → 'Ettt|tttttL'."""
    rows = ["t" * count for count in stages]
    return "E" + "|".join(rows) + "L"


def _balanced_stages(config: ParallelConfig, shape: NetworkShape) -> list[int]:
    if shape.layers < config.num_stages:
        raise ConfigError(
            f"model.num_layers={shape.layers} cannot fill {_stage_arithmetic(config)} pipeline stages; lower "
            f"parallel.pp{' or parallel.vpp' if config.vpp > 1 else f' to at most {shape.layers}'}"
        )
    layer = layer_flops(shape)
    return balance_layers(
        shape.layers,
        config.num_stages,
        first_cost=embedding_flops(shape) / layer,
        last_cost=head_flops(shape) / layer,
    )


def _given_stages(config: ParallelConfig, shape: NetworkShape) -> list[int]:
    stages = config.stages
    assert stages is not None
    if len(stages) != config.num_stages:
        raise ConfigError(
            f"parallel.stages={stages} names {len(stages)} stages and {_stage_arithmetic(config)} are needed; "
            f"give one number per stage, or null to balance them"
        )
    if sum(stages) != shape.layers:
        raise ConfigError(
            f"parallel.stages={stages} places {' + '.join(map(str, stages))} = {sum(stages)} layers and "
            f"model.num_layers={shape.layers}; make them equal, or set parallel.stages=null to balance them"
        )
    if min(stages[: max(1, len(stages) - 1)]) < 1 or stages[-1] < 0:
        raise ConfigError(
            f"parallel.stages={stages}: every stage but the last needs at least 1 layer, the last at least 0"
        )
    return list(stages)


def _check_recompute(config: ParallelConfig, stages: list[int]) -> None:
    if config.recompute is not Recompute.full or config.recompute_layers is None:
        return
    size, held = config.recompute_layers, [count for count in stages if count]
    if config.recompute_method is RecomputeMethod.block:
        if size > max(held):
            raise ConfigError(
                f"parallel.recompute_layers={size} is more than the {max(held)} layers of the largest stage "
                f"(layers per stage {stages}); lower it"
            )
    elif any(count % size for count in held):
        raise ConfigError(
            f"parallel.recompute_layers={size} does not divide the layers per stage {stages} into groups; choose a "
            f"divisor, or parallel.recompute_method=block"
        )


def _stage_arithmetic(config: ParallelConfig) -> str:
    if config.vpp == 1:
        return f"parallel.pp={config.pp}"
    return f"parallel.pp={config.pp} × parallel.vpp={config.vpp} = {config.num_stages}"
