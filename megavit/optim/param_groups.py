"""Parameter groups: which weights decay, and at what share of the learning rate each layer learns."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch.nn import Parameter

from megavit.optim.config import OptimConfig


def group_overrides(
    names: Mapping[Parameter, str],
    config: OptimConfig,
    *,
    peak_lr: float,
    num_layers: int,
    undecayed_group: Mapping[str, Any],
) -> dict[ParamKey, dict[str, Any]]:
    """What Megatron-Core is to set otherwise, and for which parameters; alike on every rank, whichever it holds.

    Args:
        names: of this rank's parameters, in the whole model.
        config: the optim group.
        peak_lr: learning rate after warm-up.
        num_layers: encoder layers of the whole model.
        undecayed_group: further entries of the groups of weights without weight decay.
    """
    no_weight_decay = {"wd_mult": 0.0, **undecayed_group}
    overrides = {_param_key("not decayed", [param for param in names if _is_not_decayed(param)]): no_weight_decay}
    if config.layer_decay is None:
        return overrides
    for depth in range(num_layers + 2):
        share = config.layer_decay ** (num_layers + 1 - depth)
        at_depth = [param for param, name in names.items() if depth_of(name, num_layers=num_layers) == depth]
        # The scheduler reads the two rates; by lr_mult, which it does not read, a checkpoint's groups are told apart
        # (0.16.1).
        overrides[_param_key(f"depth {depth}", at_depth)] = {
            "lr_mult": share,
            "max_lr": peak_lr * share,
            "min_lr": config.min_lr * share,
        }
    return overrides


def depth_of(name: str, *, num_layers: int) -> int:
    """How deep a weight stands: 0 the embedding, i + 1 the i-th layer from 0, num_layers + 1 all that follows.

    Args:
        name: the parameter's name in the whole model.
        num_layers: encoder layers of the whole model.

    Source: arXiv 2106.08254, section A.3; facebookresearch/mae counts alike.
    """
    if name.startswith("embed."):
        return 0
    layer = re.match(r"blocks\.layers\.(\d+)\.", name)
    return int(layer.group(1)) + 1 if layer else num_layers + 1


def _param_key(label: str, params: Iterable[Parameter]) -> ParamKey:
    """A key that matches these parameters; keys of one label are equal, whatever they match."""
    chosen = {id(param) for param in params}
    return ParamKey(with_name_predicate=ParamWithNamePredicate(label, lambda param, _: id(param) in chosen))


def _is_not_decayed(param: Parameter) -> bool:
    return param.ndim == 1 or getattr(param, "no_decay", False)
