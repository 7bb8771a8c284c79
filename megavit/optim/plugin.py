"""Inspect a user's optimizer class, and describe it as a row of the registry does for megavit's optimizers."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from megavit.errors import ConfigError
from megavit.optim.config import OptimConfig
from megavit.optim.registry import OptimizerSpec, rule_settings
from megavit.plugins import import_plugin

# Two dimensions: some optimizers refuse vectors.
_SHAPE = (3, 2)
_NUM_STEPS = 3


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
    state, changed = _try_steps(build, config, settings)
    if changed:
        raise ConfigError(
            f"optim.name={config.name} changes {', '.join(changed)} of its parameter groups, or holds it as a number "
            f"of each weight; a resume would reset it. Hold it as an fp32 tensor of the weight's shape"
        )
    for key, value in state.items():
        if value.shape != _SHAPE or value.dtype != torch.float32:
            raise ConfigError(
                f"optim.name={config.name} holds a state {key} of shape {tuple(value.shape)} and {value.dtype} for a "
                f"weight of shape {_SHAPE}; a checkpoint takes fp32 tensors of the weight's shape"
            )
    return OptimizerSpec(build=config.name, settings=settings, state_keys=tuple(sorted(state)))


def _try_steps(
    build: type, config: OptimConfig, settings: frozenset[str]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Take some steps of a small weight.

    Returns:
        The tensors that the class holds for the weight, and the names of what else changed, which no checkpoint saves.
        Megatron-Core saves `step`, once for all weights.
    """
    weight = torch.nn.Parameter(torch.ones(_SHAPE))
    optimizer = build([weight], lr=1e-3, weight_decay=0.0, **config.keywords(settings))
    before = _numbers(optimizer.param_groups[0])
    for step in range(_NUM_STEPS):
        weight.grad = torch.full(_SHAPE, 1.0 + step)
        optimizer.step()
    group, state = _numbers(optimizer.param_groups[0]), optimizer.state[weight]
    changed = {key for key, value in group.items() if before.get(key) != value} | _numbers(state).keys()
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and key != "step"}
    return tensors, tuple(sorted(changed - {"step"}))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) or (torch.is_tensor(value) and key != "step" and value.numel() == 1)
    }
