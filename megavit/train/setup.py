"""Build this rank's part of the network from a configuration, for training or evaluation."""

import os
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig

from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import ResolvedStep
from megavit.config.train import Compile, Precision
from megavit.errors import ConfigError
from megavit.model.init import initialise
from megavit.model.layers.encoder_layer import EncoderLayer
from megavit.model.parameters import layer_depth
from megavit.model.transformer_block import transformer_config
from megavit.model.vit import EncoderStage, parameter_names
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.stages import rank_stages
from megavit.task.base import Task
from megavit.task.registry import build_task


@dataclass(frozen=True)
class ModelSetup:
    """This rank's part of a network.

    Attributes:
        task: the task.
        resolved: shape, stages and micro batches.
        mcore_config: Megatron-Core's configuration for the encoder.
        chunks: this rank's stages by name, on its device, with their initial weights.
    """

    task: Task
    resolved: ResolvedStep
    mcore_config: TransformerConfig
    chunks: dict[str, EncoderStage]

    @property
    def parameters(self) -> dict[torch.nn.Parameter, str]:
        """Return this rank's parameters, each with its name in the full network."""
        return {parameter: name for chunk in self.chunks.values() for name, parameter in parameter_names(chunk).items()}

    def depths(self) -> dict[torch.nn.Parameter, int]:
        """Return the depth of each of this rank's parameters (see `layer_depth`)."""
        num_layers = self.mcore_config.num_layers
        return {parameter: layer_depth(name, num_layers=num_layers) for parameter, name in self.parameters.items()}


def build_model(config: ExperimentConfig, layout: ParallelLayout, resolved: ResolvedStep) -> ModelSetup:
    """Build this rank's stages with their initial weights.

    Args:
        config: the run's checked configuration.
        layout: this rank's place.
        resolved: numbers computed from the configuration, the number of ranks and the data.

    Raises:
        ConfigError: if a setting cannot run on this machine.
    """
    if config.train.compile is Compile.layer and layout.device.type == "cpu":
        _require_compiler()
    task = build_task(
        config.task,
        model=config.model,
        data=config.data,
        num_classes=resolved.num_classes,
        layout=layout,
        seed=config.run.seed,
    )
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16_o2 else torch.float32
    mcore_config = transformer_config(config.model, config.parallel, layout, stages=resolved.stages, dtype=dtype)
    chunks = task.build_chunks(
        mcore_config,
        parallel=config.parallel,
        stage_layers=rank_stages(resolved.stages, config.parallel, layout.pp_rank),
    )
    for chunk in chunks.values():
        initialise(chunk, config.model, layout, seed=config.run.seed)
        chunk.to(layout.device)
        if config.train.compile is Compile.layer:
            chunk.compile_layers()
    if config.train.compile is Compile.layer:
        _make_room_for_graphs(list(chunks.values()))
    return ModelSetup(task, resolved, mcore_config, chunks)


def _make_room_for_graphs(chunks: list[EncoderStage]) -> None:
    """Raise torch's limit of compiled graphs per function, which is 8 for any number of layers.

    Layers with the same frozen parameters share graphs: for training, the first pass of full recompute and evaluation.
    If the frozen parameters differ between layers, each layer needs its own graphs.
    """
    from torch._dynamo import config

    layers = sum(isinstance(module, EncoderLayer) for chunk in chunks for module in chunk.modules())
    # One graph more than these three per layer: torch makes a size dynamic after two values.
    config.recompile_limit = max(config.recompile_limit, 4 * layers)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * layers)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"train.compile=layer needs a C++ compiler on a CPU, and CXX={os.environ.get('CXX', 'g++')} does not run; "
            f"install one (Debian: apt-get install g++), name it by CXX, or set train.compile=none"
        ) from error
