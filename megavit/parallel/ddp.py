"""Wrap a rank's stages with gradient buffers that are reduced over the data-parallel ranks."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from megavit.errors import ConfigError
from megavit.parallel.config import ParallelConfig


class GradientBuffers(DistributedDataParallel):
    """Megatron-Core's wrapper without its unnecessary passes over all gradients (0.16.1).

    A step does not start by setting gradients to zero: the first micro batch's gradient is written, not added, here or
    by a matrix product that writes into the buffer (model/layers/linear.py); until then `is_grad_stale` is true.

    If no other rank holds the same weights, nothing is reduced or gathered: in a group of one rank, gloo copies each
    gradient three times and each weight once.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for param in self.params_with_grad:
            param.is_grad_stale = True
        self._is_alone = self.dp_cp_group.size() == 1

    def zero_grad_buffer(self) -> None:
        """Mark the last step's gradients as stale."""
        for param in self.params_with_grad:
            param.grad_added_to_main_grad = False
            param.is_grad_stale = True
        for group in self.bucket_groups:
            group.reset()

    def _make_backward_post_hook(self, param: Any) -> Callable[..., None]:
        add = super()._make_backward_post_hook(param)

        def hook(*unused: Any) -> None:
            if param.grad is not None and param.is_grad_stale and not param.grad_added_to_main_grad:
                param.main_grad.copy_(param.grad)
                # Otherwise it would be added too.
                param.grad_added_to_main_grad = True
            param.is_grad_stale = param.is_grad_stale and param.grad is None
            add()
            param.grad_added_to_main_grad = False

        return hook

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        wait = super()._make_forward_pre_hook()

        def hook(module: torch.nn.Module, *unused: Any) -> None:
            # A layer uses its matrices without calling the modules that hold them, so their hooks do not run: the
            # layer waits for all of its weights. Inside a compiled layer the weights have already arrived.
            parts = module.modules() if isinstance(module, BaseTransformerLayer) else [module]
            if not torch.compiler.is_compiling():
                for part in parts:
                    wait(part)

        return hook

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Finish reducing the gradients; gradients of weights that were not used become zero."""
        for param in self.params_with_grad:
            if param.is_grad_stale:
                param.main_grad.zero_()
                param.is_grad_stale = False
        if not self._is_alone:
            super().finish_grad_sync(force_all_reduce)

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Gather every rank's part of the new weights."""
        if not self._is_alone:
            super().start_param_sync(*unused, force_sync=force_sync, force_dispatch=force_dispatch)


def wrap_for_data_parallel(
    chunks: list[MegatronModule],
    mcore_config: TransformerConfig,
    parallel: ParallelConfig,
    *,
    use_distributed_optimizer: bool,
    bf16_reduce: bool,
    fused_accumulation: bool,
) -> list[DistributedDataParallel]:
    """Wrap this rank's stages with gradient buffers that are reduced over the data-parallel ranks.

    Args:
        chunks: this rank's stages, on their device.
        mcore_config: Megatron-Core's configuration; gets the hooks with which the schedules overlap communication.
        parallel: the parallel group, which says what overlaps.
        use_distributed_optimizer: reduce-scatter the gradients, for an optimizer whose state is sharded over the
            data-parallel ranks; otherwise all-reduce them.
        bf16_reduce: accumulate and reduce in bf16 instead of fp32.
        fused_accumulation: whether matrix products of the layers are added to the buffers directly.

    Raises:
        ConfigError: if fused accumulation does not work on this device.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not bf16_reduce,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
    )
    # Megatron-Core's kernels would add to the last step's gradients.
    assert not mcore_config.gradient_accumulation_fusion
    stages = [Float16Module(mcore_config, chunk) for chunk in chunks] if mcore_config.bf16 else chunks
    # Only the first stage's reduction is on the critical path, so only that stage has several buckets.
    model: list[DistributedDataParallel] = [
        GradientBuffers(mcore_config, ddp, stage, disable_bucketing=index > 0) for index, stage in enumerate(stages)
    ]
    if fused_accumulation:
        for chunk in model:
            for param in chunk.params_with_grad:
                _let_accumulate(param)
    if parallel.overlap_grad_reduce:
        mcore_config.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
    if parallel.overlap_param_gather:
        mcore_config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])
    return model


def _let_accumulate(weight: Any) -> None:
    """Let matrix products of a layer's weight be added to its buffer directly (model/layers/linear.py)."""
    if weight.main_grad.dtype != weight.dtype and weight.device.type != "cuda":
        raise ConfigError(
            "train.gradient_accumulation_fusion=true adds products of bf16 numbers to fp32 gradients, which torch does "
            "on CUDA only, and this run is on the CPU; set it to false, or train.precision=fp32"
        )
    weight.accumulates = True


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions
