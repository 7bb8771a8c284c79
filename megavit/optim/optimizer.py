"""Gradients to weights: data-parallel wrapping, the optimizer, the schedule."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule, TransformerConfig

from megavit.optim.config import OptimConfig, Optimizer
from megavit.optim.fused_adam import offer_to_megatron


def wrap_for_data_parallel(
    model: MegatronModule, block: TransformerConfig, config: OptimConfig
) -> DistributedDataParallel:
    """Give the model gradient buffers in fp32 that are reduced over the data-parallel ranks.

    Args:
        model: this stage's chunk, on its device.
        block: Megatron-Core's configuration.
        config: the optim group; Adam's gradients are reduced and scattered, others' all-reduced.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.name is Optimizer.adamw
    )
    return DistributedDataParallel(block, ddp, model)


def build_optimizer(
    model: DistributedDataParallel, block: TransformerConfig, config: OptimConfig, *, peak_lr: float
) -> MegatronOptimizer:
    """Build Megatron-Core's optimizer: for Adam always the distributed one, so that one checkpoint form exists.

    Args:
        model: from `wrap_for_data_parallel`.
        block: gets the hooks that the schedules call at the end of a step.
        config: the optim group.
        peak_lr: learning rate after warm-up.
    """
    adam = config.name is Optimizer.adamw
    if adam:
        offer_to_megatron()
    numbers = {}
    if adam:
        assert config.betas is not None and config.eps is not None
        numbers = dict(adam_beta1=config.betas[0], adam_beta2=config.betas[1], adam_eps=config.eps)
    else:
        assert config.momentum is not None
        numbers = dict(sgd_momentum=config.momentum)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam" if adam else "sgd",
            lr=peak_lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            # Also where nothing is clipped: the norm is logged, and a norm that is not finite stops the run.
            clip_grad=config.clip or float("inf"),
            params_dtype=torch.float32,
            use_distributed_optimizer=adam,
            **numbers,
        ),
        [model],
        config_overrides={
            ParamKey(with_name_predicate=ParamWithNamePredicate("no_decay", _is_not_decayed)): {"wd_mult": 0.0}
        },
    )
    if not adam:
        # Before a load, state must exist to be filled; for SGD Megatron-Core knows no way to make it (0.16.1).
        (inner,) = optimizer.chained_optimizers
        inner.init_state_fn = _make_momentum
    block.grad_scale_func = optimizer.scale_loss
    block.finalize_model_grads_func = finalize_model_grads
    return optimizer


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimConfig, *, peak_lr: float, num_steps: int
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay, a function of the step alone.

    Megatron-Core applies a group's weight-decay and learning-rate factors here and nowhere else.

    Args:
        optimizer: whose groups it writes to.
        config: the optim group.
        peak_lr: learning rate after warm-up.
        num_steps: of the whole run; the cosine ends there.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak_lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style=config.decay.value,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _make_momentum(optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def _is_not_decayed(param: torch.nn.Parameter, name: str) -> bool:
    return param.ndim == 1 or name.endswith((".bias", "cls_token", "pos_embed"))
