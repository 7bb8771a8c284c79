"""The table of optimizers that `optim.name` selects; imports no torch, so that settings are checked without it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megavit.plugins import is_plugin


@dataclass(frozen=True)
class OptimizerSpec:
    """One row: an optimizer's class, settings and state.

    Attributes:
        build: `package.module:Class` of a torch.optim.Optimizer, imported when a run builds it. It is called with the
            parameter groups and, by keyword, `lr`, `weight_decay` and the settings below; with `tensor_parallel_group`
            too if its constructor has such an argument.
        settings: fields of the optim group that belong to this optimizer. They must be set; the fields that belong to
            other optimizers alone must be null.
        state_keys: names of the tensors in its state of one weight, each fp32 and of the weight's shape. They exist
            before a checkpoint is loaded.
        no_state_at_zero: the setting that switches the state off if it is 0; None if there is always state.
        sharded: whether Megatron-Core shards the state over the data-parallel ranks. It does so for classes with the
            arguments and the state of Adam alone (0.16.1).
        implementations: other classes with the same settings and state, by the value of `optim.implementation`.
        undecayed_group: entries of the parameter group of weights without weight decay.
        warning_from_scratch: warning for a run that starts from random weights; None for none.
    """

    build: str
    settings: frozenset[str]
    state_keys: tuple[str, ...]
    no_state_at_zero: str | None = None
    sharded: bool = False
    implementations: Mapping[str, str] = field(default_factory=dict)
    undecayed_group: Mapping[str, Any] = field(default_factory=dict)
    warning_from_scratch: str | None = None


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(
        build="megavit.optim.fused_adam:FusedAdam",
        settings=frozenset({"betas", "eps", "implementation"}),
        state_keys=("exp_avg", "exp_avg_sq"),
        sharded=True,
        implementations={
            "apex": "apex.optimizers:FusedAdam",
            "te": "transformer_engine.pytorch.optimizers:FusedAdam",
        },
    ),
    "sgd": OptimizerSpec(
        build="torch.optim:SGD",
        settings=frozenset({"momentum"}),
        state_keys=("momentum_buffer",),
        no_state_at_zero="momentum",
        # Source: arXiv 2106.14881, section 5 (ViTs under SGD and AdamW).
        warning_from_scratch=(
            "with plain SGD a Vision Transformer learns far worse from scratch than with AdamW (arXiv 2106.14881); SGD "
            "is for fine-tuning: choose optim=adamw, or weights to start from, init_from=…"
        ),
    ),
    "lars": OptimizerSpec(
        build="megavit.optim.lars:TensorParallelLars",
        settings=frozenset({"momentum", "trust_coefficient"}),
        state_keys=("momentum_buffer",),
        # Weights without weight decay are not adapted, but learn as with SGD (arXiv 1708.03888 excludes biases).
        undecayed_group={"always_adapt": False},
    ),
}


def is_sharded(name: str) -> bool:
    """Return whether Megatron-Core shards an optimizer's state over the data-parallel ranks; never that of a plug-in.

    Args:
        name: `optim.name`, checked.
    """
    return not is_plugin(name) and OPTIMIZERS[name].sharded


def rule_settings() -> frozenset[str]:
    """Return the fields of the optim group that belong to some optimizers and not to others."""
    return frozenset().union(*(spec.settings for spec in OPTIMIZERS.values()))
