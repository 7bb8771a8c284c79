"""This rank's stages of a network, by the names under which Megatron-Core's optimizer looks for them."""

from collections.abc import Callable

from megavit.data.config import DataConfig
from megavit.model.vit import EncoderStage, Stage
from megavit.parallel.config import ParallelConfig


def build_model_chunks(
    build: Callable[[Stage], EncoderStage], *, parallel: ParallelConfig, data: DataConfig, stage_layers: list[int]
) -> dict[str, EncoderStage]:
    """Build each of this rank's stages.

    Args:
        build: a stage's part of the network.
        parallel: the parallel group.
        data: the data group, for the images' shape.
        stage_layers: encoder layers of each of this rank's stages.
    """
    stages = [
        Stage(num_layers, index, parallel.recompute, data.image_size, data.channels)
        for index, num_layers in enumerate(stage_layers)
    ]
    names = ["model"] if len(stages) == 1 else [f"model{index}" for index in range(len(stages))]
    return {name: build(stage) for name, stage in zip(names, stages, strict=True)}
