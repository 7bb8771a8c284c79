"""Replace functions and classes of Megatron-Core 0.16.1: the one place where megavit patches it.

Each function is called by the module that provides the replacement. On the CPU, `cpu_backend` also rewrites
Megatron-Core's modules while they are imported. docs/megatron.md lists all patches with their reasons.
"""

import queue
from collections.abc import Callable
from typing import Any


def replace_adam(adam: type) -> None:
    """Make Megatron-Core construct this class as Adam, with apex's layout of the optimizer's state.

    Without apex or Transformer Engine, its own path with torch's AdamW cannot resume a distributed optimizer.
    """
    import megatron.core.optimizer as mcore_optimizer
    import megatron.core.optimizer.distrib_optimizer as mcore_distributed

    mcore_optimizer.Adam, mcore_optimizer.USING_PYTORCH_OPTIMIZER = adam, False
    mcore_distributed.Adam = adam
    mcore_distributed.HAVE_APEX_OR_TE, mcore_distributed.USING_APEX_OPTIMIZER = True, True


def replace_sgd(build: Callable[..., Any]) -> None:
    """Make Megatron-Core call this function where it would construct SGD: it knows only Adam and SGD."""
    import megatron.core.optimizer as mcore_optimizer

    mcore_optimizer.SGD = build


def replace_norm_functions(*, l2_norm: Callable[..., Any], scale: Callable[..., Any]) -> None:
    """Make Megatron-Core compute norms of gradients and scale them with these functions.

    Without Transformer Engine and apex, it reads the norm of every single gradient back to the host. If one of them is
    installed, its functions stay in use.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
        clip_grads.multi_tensor_scale_impl = scale


def replace_shards(optimizer: Any, *, save: Callable[..., Any], load: Callable[..., Any]) -> None:
    """Make a distributed optimizer save and load its state with these functions, which gather nothing.

    Args:
        optimizer: Megatron-Core's `DistributedOptimizer`.
        save: in place of its `sharded_state_dict`.
        load: in place of its `load_parameter_state_from_fully_reshardable`.
    """
    optimizer.sharded_state_dict = save
    optimizer.load_parameter_state_from_fully_reshardable = load


def use_local_queue() -> None:
    """Give Megatron-Core's checkpoint writer a queue of this process; it would start a manager process for its own."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
