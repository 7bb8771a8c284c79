"""Build the optimizer and the learning-rate schedule."""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megavit.errors import ConfigError
from megavit.optim.config import OptimConfig, Schedule
from megavit.optim.param_groups import group_overrides
from megavit.optim.plugin import inspect_plugin
from megavit.optim.registry import OPTIMIZERS, OptimizerSpec
from megavit.optim.step import use_batched_norms
from megavit.parallel import megatron_patches
from megavit.plugins import import_plugin, is_plugin

_FP32_BYTES = 4


def find_spec(config: OptimConfig) -> OptimizerSpec:
    """Return the row of the optimizer that `optim.name` names; a plug-in is imported and inspected.

    Raises:
        ConfigError: if a plug-in does not fit.
    """
    return inspect_plugin(config) if is_plugin(config.name) else OPTIMIZERS[config.name]


def state_bytes(config: OptimConfig) -> int:
    """Return the bytes of optimizer state per trained weight, without its fp32 copy under bf16."""
    return _FP32_BYTES * len(_state_keys(find_spec(config), config))


def build_optimizer(
    model: list[DistributedDataParallel],
    mcore_config: TransformerConfig,
    config: OptimConfig,
    *,
    depths: Mapping[torch.nn.Parameter, int],
    peak_lr: float,
) -> MegatronOptimizer:
    """Build Megatron-Core's optimizer around the class that the configuration names.

    A sharded one is always the distributed optimizer, also on one data-parallel rank: its state has one form in
    checkpoints.

    Args:
        model: from `ddp.wrap_for_data_parallel`.
        mcore_config: gets the hooks that the schedules call at the end of a step.
        config: the optim group.
        depths: of this rank's parameters, see `group_overrides`.
        peak_lr: learning rate after warm-up.

    Raises:
        ConfigError: if the class is not installed, or a plug-in does not fit.
    """
    spec = find_spec(config)
    build = _import_class(spec, config)
    numbers = {}
    if spec.sharded:
        megatron_patches.replace_adam(build)
        assert config.betas is not None and config.eps is not None
        numbers = dict(adam_beta1=config.betas[0], adam_beta2=config.betas[1], adam_eps=config.eps)
    else:
        keywords = config.keywords(spec.settings)
        if "tensor_parallel_group" in inspect.signature(build).parameters:
            keywords["tensor_parallel_group"] = model[0].tp_group
        # Megatron-Core constructs only Adam and SGD; any other class is built where it would construct SGD (0.16.1).
        megatron_patches.replace_sgd(partial(_build_other, build, keywords))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam" if spec.sharded else "sgd",
            lr=peak_lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            # Clipping stays on with an infinite limit, because it computes the norm, which is logged and checked.
            clip_grad=config.clip_grad or float("inf"),
            bf16=mcore_config.bf16,
            params_dtype=mcore_config.params_dtype,
            use_distributed_optimizer=spec.sharded,
            **numbers,
        ),
        model,
        config_overrides=group_overrides(
            depths, config, peak_lr=peak_lr, num_layers=mcore_config.num_layers, undecayed_group=spec.undecayed_group
        ),
    )
    if not spec.sharded:
        # State must exist before a checkpoint is loaded into it; Megatron-Core creates only Adam's (0.16.1).
        (inner,) = optimizer.chained_optimizers
        inner.init_state_fn = partial(_make_state, _state_keys(spec, config))
    use_batched_norms()
    mcore_config.grad_scale_func = optimizer.scale_loss
    mcore_config.finalize_model_grads_func = finalize_model_grads
    return optimizer


def _state_keys(spec: OptimizerSpec, config: OptimConfig) -> tuple[str, ...]:
    switch = spec.no_state_at_zero
    return spec.state_keys if switch is None or getattr(config, switch) else ()


def _import_class(spec: OptimizerSpec, config: OptimConfig) -> Any:
    if is_plugin(config.name):
        return import_plugin(config.name, "optim.name")
    implementation = config.implementation.value if config.implementation is not None else ""
    module, _, name = spec.implementations.get(implementation, spec.build).partition(":")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        if implementation not in spec.implementations:
            raise
        raise ConfigError(
            f"optim.implementation={implementation} is not installed (the `apex` of the package index is an "
            f"unrelated project; NVIDIA's container has both); set optim.implementation=megavit"
        ) from error


def _build_other(
    build: Any, keywords: Mapping[str, Any], params: Iterable[Any], *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Build an optimizer where Megatron-Core would construct SGD; its momentum, if any, is among the keywords."""
    return build(params, lr=lr, weight_decay=weight_decay, **keywords)


def _make_state(keys: tuple[str, ...], optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            for key in keys:
                optimizer.state[param].setdefault(key, torch.zeros_like(param))


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimConfig, *, peak_lr: float, warmup_steps: int, num_steps: int
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay, a function of the step only.

    Megatron-Core applies a group's weight-decay and learning-rate factors here and nowhere else.

    Args:
        optimizer: the optimizer whose groups the schedule writes to.
        config: the optim group.
        peak_lr: learning rate after warm-up.
        warmup_steps: steps of linear warm-up.
        num_steps: steps of the full run, at whose end the learning rate is min_lr.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak_lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style="WSD" if config.schedule is Schedule.wsd else config.schedule.value,
        wsd_decay_steps=config.decay_steps,
        lr_wsd_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
