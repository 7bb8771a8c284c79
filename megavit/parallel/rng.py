"""Stateless randomness: every draw is a function of what it is for, so no generator state is ever saved.

Shapes: any; integers are int64 and wrap, as the hash needs.
"""

import torch
from torch import Tensor

from megavit.parallel.layout import ParallelLayout

# The finaliser of SplitMix64 (Steele, Lea, Flood 2014, OOPSLA), its unsigned constants as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hash_int64(*parts: Tensor | int) -> Tensor:
    """Hash integers, elementwise with broadcasting, to 64 well-mixed bits; equal on CPU and GPU.

    Args:
        parts: what the draw is for, in order: seed, epoch, sample id, …

    Returns:
        int64 tensor of the broadcast shape.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        part = torch.as_tensor(part, dtype=torch.int64)
        if part.device != state.device:
            state = state.to(part.device)
        state = _finalise((state ^ part) + _GOLDEN)
    return state


def uniform(*parts: Tensor | int) -> Tensor:
    """Draw from [0, 1) in float64, a pure function of the parts (53 of the hash's bits)."""
    return _shift_right(hash_int64(*parts), 11).double() * 2.0**-53


def seed_step(layout: ParallelLayout, *, seed: int, step: int) -> None:
    """Seed the dropout of one training step from (seed, step, rank coordinates).

    The default generator is alike on the ranks of one tensor-parallel group, whose replicated activations must drop
    alike, and so is the tracker's data-parallel state, for drop path under sequence parallelism; its model-parallel
    state differs between them, for what they split (heads, and tokens under sequence parallelism).
    """
    from megatron.core.tensor_parallel import random as mcore_random

    place = (seed, step, layout.dp_rank, layout.pp_rank)
    default, common, own = (
        int(hash_int64(*place, *purpose)) & (2**62 - 1) for purpose in ((0,), (1,), (2, layout.tp_rank))
    )
    torch.manual_seed(default)
    tracker = mcore_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(mcore_random.get_data_parallel_rng_tracker_name(), common)
    tracker.add(mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME, own)
