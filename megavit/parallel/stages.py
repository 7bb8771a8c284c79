"""Encoder layers onto pipeline stages, in the notation Megatron-Core reads."""

from megavit.errors import ConfigError
from megavit.parallel.config import ParallelConfig
from megavit.plan.flops import EncoderShape, embedding_flops, head_flops, layer_flops
from megavit.plan.stages import balance_layers


def plan_stages(config: ParallelConfig, shape: EncoderShape) -> list[int]:
    """Choose how many encoder layers each stage holds.

    Args:
        config: `parallel.stages` as given, or null to balance by FLOPs.
        shape: the encoder, for the weight of what the first and last stage do besides.

    Raises:
        ConfigError: if the layers do not fit the stages.
    """
    if config.stages is None:
        if shape.layers < config.pp:
            raise ConfigError(
                f"model.num_layers={shape.layers} cannot fill parallel.pp={config.pp} pipeline stages; "
                f"lower parallel.pp to at most {shape.layers}"
            )
        layer = layer_flops(shape)
        return balance_layers(
            shape.layers, config.pp, first_cost=embedding_flops(shape) / layer, last_cost=head_flops(shape) / layer
        )
    if len(config.stages) != config.pp:
        raise ConfigError(
            f"parallel.stages={config.stages} names {len(config.stages)} stages and parallel.pp={config.pp} has "
            f"{config.pp}; give one number per stage, or null to balance them"
        )
    if sum(config.stages) != shape.layers:
        raise ConfigError(
            f"parallel.stages={config.stages} places {' + '.join(map(str, config.stages))} = {sum(config.stages)} "
            f"layers and model.num_layers={shape.layers}; make them equal, or set parallel.stages=null to balance them"
        )
    if min(config.stages[: max(1, config.pp - 1)]) < 1 or config.stages[-1] < 0:
        raise ConfigError(
            f"parallel.stages={config.stages}: every stage but the last needs at least 1 layer, the last at least 0"
        )
    return list(config.stages)


def megatron_layout(stages: list[int]) -> str:
    """Spell the stages as Megatron-Core's `pipeline_model_parallel_layout`, [3, 5] → 'Ettt|tttttL'."""
    rows = ["t" * count for count in stages]
    return "E" + "|".join(rows) + "L"
