"""Gradients to weights: the optimizer, the schedule."""

from collections.abc import Mapping
from functools import partial

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megavit.errors import ConfigError
from megavit.optim import fused_adam, grad_norm
from megavit.optim.config import Implementation, OptimConfig, Optimizer, Schedule
from megavit.optim.param_groups import group_overrides


def build_optimizer(
    model: list[DistributedDataParallel],
    mcore_config: TransformerConfig,
    config: OptimConfig,
    *,
    depths: Mapping[torch.nn.Parameter, int],
    peak_lr: float,
) -> MegatronOptimizer:
    """Build Megatron-Core's optimizer: for Adam always the distributed one, so that one checkpoint form exists.

    Args:
        model: from `data_parallel.wrap_for_data_parallel`.
        mcore_config: gets the hooks that the schedules call at the end of a step.
        config: the optim group.
        depths: of this rank's parameters, see `group_overrides`.
        peak_lr: learning rate after warm-up.
    """
    adam = config.name is Optimizer.adamw
    numbers = {}
    if adam:
        _choose_adam(config.implementation)
        assert config.betas is not None and config.eps is not None
        numbers = dict(adam_beta1=config.betas[0], adam_beta2=config.betas[1], adam_eps=config.eps)
    else:
        assert config.momentum is not None
        numbers = dict(sgd_momentum=config.momentum)
        _choose_sgd(config, model[0].tp_group)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam" if adam else "sgd",
            lr=peak_lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            # Also where nothing is clipped: the norm is logged, and a norm that is not finite stops the run.
            clip_grad=config.clip_grad or float("inf"),
            bf16=mcore_config.bf16,
            params_dtype=mcore_config.params_dtype,
            use_distributed_optimizer=adam,
            **numbers,
        ),
        model,
        config_overrides=group_overrides(depths, config, peak_lr=peak_lr, num_layers=mcore_config.num_layers),
    )
    if not adam:
        # Before a load, state must exist to be filled; for these Megatron-Core knows no way to make it (0.16.1).
        (inner,) = optimizer.chained_optimizers
        inner.init_state_fn = _make_momentum
    grad_norm.offer_to_megatron()
    mcore_config.grad_scale_func = optimizer.scale_loss
    mcore_config.finalize_model_grads_func = finalize_model_grads
    return optimizer


def _choose_adam(implementation: Implementation | None) -> None:
    """Have Megatron-Core take the named class; by itself it would take whichever is installed.

    Raises:
        ConfigError: if the named one is missing.
    """
    if implementation is Implementation.megavit:
        fused_adam.offer_to_megatron(fused_adam.FusedAdam)
        return
    try:
        if implementation is Implementation.apex:
            from apex.optimizers import FusedAdam
        else:
            from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError as error:
        assert implementation is not None
        raise ConfigError(
            f"optim.implementation={implementation.value} is not installed (the `apex` of the package index is an "
            f"unrelated project; NVIDIA's container has both); set optim.implementation=megavit"
        ) from error
    fused_adam.offer_to_megatron(FusedAdam)


def _choose_sgd(config: OptimConfig, tensor_parallel: torch.distributed.ProcessGroup) -> None:
    """Have Megatron-Core take LARS, or torch's SGD, where it would take SGD."""
    if config.name is Optimizer.sgd:
        megatron_optimizer.SGD = torch.optim.SGD
        return
    from megavit.optim.lars import TensorParallelLars

    megatron_optimizer.SGD = partial(
        TensorParallelLars, group=tensor_parallel, trust_coeff=config.trust_coefficient, always_adapt=True
    )


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimConfig, *, peak_lr: float, warmup_steps: int, num_steps: int
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay, a function of the step alone.

    Megatron-Core applies a group's weight-decay and learning-rate factors here and nowhere else.

    Args:
        optimizer: whose groups it writes to.
        config: the optim group.
        peak_lr: learning rate after warm-up.
        warmup_steps: steps of linear warm-up.
        num_steps: of the whole run; where the fall ends.
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


def _make_momentum(optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    for group in optimizer.param_groups:
        for param in group["params"] if group["momentum"] else ():
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
