"""Inspect a user's optimizer class, and describe it as a row of the registry does for megavit's optimizers."""

import inspect

import torch

from megavit.errors import ConfigError
from megavit.optim.config import OptimConfig
from megavit.optim.registry import OptimizerSpec, rule_settings
from megavit.plugins import import_plugin

# Two dimensions: some optimizers refuse vectors.
_SHAPE = (3, 2)


def inspect_plugin(config: OptimConfig) -> OptimizerSpec:
    """Describe the class that `optim.name` names.

    Its settings are those of its constructor's arguments that the optim group has; its state is what it holds after a
    step of one small weight.

    Raises:
        ConfigError: if it takes no weight decay, would ignore a setting, or holds state that a checkpoint cannot shard.
    """
    build = import_plugin(config.name, "optim.name")
    arguments = inspect.signature(build).parameters
    missing = [name for name in ("lr", "weight_decay") if name not in arguments]
    if missing:
        raise ConfigError(
            f"optim.name={config.name} takes no argument {' and no argument '.join(missing)}; see docs/extending.md"
        )
    settings = rule_settings() & arguments.keys()
    config.refuse_ignored(settings)
    state = _state_after_a_step(build, config, settings)
    for key, value in state.items():
        if value.shape != _SHAPE or value.dtype != torch.float32:
            raise ConfigError(
                f"optim.name={config.name} holds a state {key} of shape {tuple(value.shape)} and {value.dtype} for a "
                f"weight of shape {_SHAPE}; a checkpoint takes fp32 tensors of the weight's shape"
            )
    return OptimizerSpec(build=config.name, settings=settings, state_keys=tuple(sorted(state)))


def _state_after_a_step(build: type, config: OptimConfig, settings: frozenset[str]) -> dict[str, torch.Tensor]:
    weight = torch.nn.Parameter(torch.ones(_SHAPE))
    weight.grad = torch.ones(_SHAPE)
    optimizer = build([weight], lr=1e-3, weight_decay=0.0, **config.keywords(settings))
    optimizer.step()
    # Megatron-Core saves `step` once for all weights.
    return {key: value for key, value in optimizer.state[weight].items() if torch.is_tensor(value) and key != "step"}
