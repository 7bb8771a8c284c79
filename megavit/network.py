"""From a configuration to this rank's part of its network, for whoever trains it or only looks at it."""

from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig

from megavit.config import RunConfig
from megavit.model.block import transformer_config
from megavit.model.init import initialise
from megavit.model.vit import EncoderStage, parameter_names
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.stages import plan_stages, rank_stages
from megavit.plan.flops import NetworkShape
from megavit.sections import Compile, Precision
from megavit.task.task import Task, open_task


@dataclass(frozen=True)
class Network:
    """This rank's part of a network.

    Attributes:
        task: what it is for.
        shape: what its FLOPs depend on.
        stages: encoder layers of every stage.
        block: Megatron-Core's configuration of the encoder.
        chunks: this rank's stages by name, on its device, with their initial weights.
    """

    task: Task
    shape: NetworkShape
    stages: list[int]
    block: TransformerConfig
    chunks: dict[str, EncoderStage]

    @property
    def parameters(self) -> dict[torch.nn.Parameter, str]:
        """This rank's parameters, each with its name in the whole network."""
        return {parameter: name for chunk in self.chunks.values() for name, parameter in parameter_names(chunk).items()}


def build_network(config: RunConfig, layout: ParallelLayout, *, num_classes: int) -> Network:
    """Build this rank's stages and draw their initial weights.

    Args:
        config: checked.
        layout: this rank's place.
        num_classes: of the data.
    """
    task = open_task(
        config.task,
        model=config.model,
        data=config.data,
        num_classes=num_classes,
        layout=layout,
        seed=config.run.seed,
    )
    shape = config.network_shape(num_classes=num_classes)
    stages = plan_stages(config.parallel, shape)
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16_o2 else torch.float32
    block = transformer_config(config.model, config.parallel, layout, stages=stages, dtype=dtype)
    chunks = task.build_chunks(
        block, parallel=config.parallel, stage_layers=rank_stages(stages, config.parallel, layout.pp_rank)
    )
    for chunk in chunks.values():
        initialise(chunk, config.model, layout, seed=config.run.seed)
        chunk.to(layout.device)
        if config.train.compile is Compile.layer:
            chunk.compile_layers()
    return Network(task, shape, stages, block, chunks)
