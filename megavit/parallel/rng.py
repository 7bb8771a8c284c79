"""Compute random numbers as pure functions of seed, epoch and sample, so that no generator state is saved.

Shapes: any; integers are int64 and wrap, as the hash needs.
"""

from enum import IntEnum

import torch
from torch import Tensor

from megavit.parallel.layout import ParallelLayout

# SplitMix64's increment and the two factors of its finaliser, unsigned (Steele, Lea, Flood 2014, OOPSLA).
SPLITMIX64 = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

_INCREMENT, _MIX_1, _MIX_2 = (constant - (1 << 64) for constant in SPLITMIX64)


class RandomStream(IntEnum):
    """The purpose of a sample's random numbers; numbers of different streams are independent.

    `hash_int64` takes a stream after the seed and the sample's key. The numbers are part of a run's reproducibility:
    new streams get new numbers, and no number is reused.
    """

    SHIFT_DOWN = 1
    SHIFT_ACROSS = 2
    IMAGE_TRANSFORM = 3
    BAD_SAMPLE = 4
    MIX_WHETHER = 10
    MIX_WHICH = 11
    MIX_SHARE = 12
    MIX_DOWN = 13
    MIX_ACROSS = 14
    ERASE_WHETHER = 20
    ERASE_AREA = 21
    ERASE_ASPECT = 22
    ERASE_DOWN = 23
    ERASE_ACROSS = 24
    ERASE_NOISE = 25
    MASK = 1000


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hash_int64(*parts: Tensor | int) -> Tensor:
    """Hash integers, elementwise with broadcasting, to 64 well-mixed bits; equal on CPU and GPU.

    Args:
        parts: integers that identify the number, in order: seed, epoch, sample id, …

    Returns:
        int64 tensor of the broadcast shape.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        # Plain numbers stay Python numbers: as CPU tensors they would move the state to the host, which would wait.
        if isinstance(part, Tensor) and part.device != state.device:
            state = state.to(part.device, non_blocking=True)
        part = part.to(torch.int64) if isinstance(part, Tensor) else int(part)
        state = _finalise((state ^ part) + _INCREMENT)
    return state


def uniform(*parts: Tensor | int) -> Tensor:
    """Return float64 numbers uniform in [0, 1), a pure function of the parts (53 of the hash's bits).

    Args:
        parts: see `hash_int64`.
    """
    return _shift_right(hash_int64(*parts), 11).double() * 2.0**-53


def normal(*parts: Tensor | int) -> Tensor:
    """Return float32 noise of mean 0 and standard deviation 1, the same bits on every device.

    Each number is the sum of a hash's eight bytes: close to normal, but within 4.9 standard deviations (excess
    kurtosis −0.15). It uses no logarithm or cosine, whose last bit differs between devices.

    Args:
        parts: see `hash_int64`.
    """
    draws, low = hash_int64(*parts), 0x00FF00FF00FF00FF
    pairs = (draws & low) + (_shift_right(draws, 8) & low)
    total = _shift_right(pairs * 0x0001000100010001, 48)
    return (total - 1020).float() * (8 * (256**2 - 1) / 12) ** -0.5


def drawn_from(quantiles: Tensor, draws: Tensor) -> Tensor:
    """Map uniform numbers to a distribution given by its quantiles.

    The function looks values up instead of computing a formula: the last bit of torch's power function depends on the
    number of elements (533 of 32,000 numbers differ between 2 and 16 on the CPU, torch 2.15), and a sample's numbers
    must not depend on its micro batch.

    Args:
        quantiles: equally likely values, ascending.
        draws: uniform numbers in [0, 1).
    """
    return quantiles[(draws * len(quantiles)).long()]


def seed_step(layout: ParallelLayout, *, seed: int, step: int) -> None:
    """Seed the dropout of one training step from (seed, step, rank coordinates).

    The ranks of one tensor-parallel group get the same default generator, because their replicated activations need
    the same dropout, and the same data-parallel state of the tracker, for drop path under sequence parallelism. They
    get different model-parallel states of the tracker, for what they split: heads, and tokens under sequence
    parallelism.

    Args:
        layout: this rank's place.
        seed: `run.seed`.
        step: optimizer steps done.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    place = (seed, step, layout.dp_rank, layout.pp_rank)
    default, common, per_rank = (
        int(hash_int64(*place, *purpose)) & (2**62 - 1) for purpose in ((0,), (1,), (2, layout.tp_rank))
    )
    torch.manual_seed(default)
    tracker = mcore_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(mcore_random.get_data_parallel_rng_tracker_name(), common)
    tracker.add(mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME, per_rank)
