"""Build the parameter groups, which set weight decay and each layer's factor of the learning rate."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch.nn import Parameter

from megavit.optim.config import OptimConfig


def group_overrides(
    depths: Mapping[Parameter, int],
    config: OptimConfig,
    *,
    peak_lr: float,
    num_layers: int,
    undecayed_group: Mapping[str, Any],
) -> dict[ParamKey, dict[str, Any]]:
    """Return the group settings that differ from the defaults, and their parameters; the same keys on every rank.

    Args:
        depths: depth of each parameter of this rank: 0 for the embedding, i + 1 for encoder layer i, num_layers + 1
            for all that follows.
        config: the optim group.
        peak_lr: learning rate after warm-up.
        num_layers: encoder layers of the full model.
        undecayed_group: further entries of the groups of weights without weight decay.
    """
    no_weight_decay = {"wd_mult": 0.0, **undecayed_group}
    overrides = {_param_key("not decayed", [param for param in depths if _is_not_decayed(param)]): no_weight_decay}
    if config.layer_decay is None:
        return overrides
    for depth in range(num_layers + 2):
        share = config.layer_decay ** (num_layers + 1 - depth)
        at_depth = [param for param, own in depths.items() if own == depth]
        # The scheduler reads the two rates. It does not read lr_mult, but checkpoints identify groups by it (0.16.1).
        overrides[_param_key(f"depth {depth}", at_depth)] = {
            "lr_mult": share,
            "max_lr": peak_lr * share,
            "min_lr": config.min_lr * share,
        }
    return overrides


def _param_key(label: str, params: Iterable[Parameter]) -> ParamKey:
    """Return a key that matches these parameters; keys of one label are equal, even if they match others."""
    chosen = {id(param) for param in params}
    return ParamKey(with_name_predicate=ParamWithNamePredicate(label, lambda param, _: id(param) in chosen))


def _is_not_decayed(param: Parameter) -> bool:
    return param.ndim == 1 or getattr(param, "no_decay", False)
