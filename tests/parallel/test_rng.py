import numpy as np
import pytest
import torch

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.permutation import FeistelPermutation
from megavit.data.sampler import SampleKey
from megavit.data.transforms.image import ImageTransform
from megavit.data.transforms.mixup import MixupCutmix
from megavit.data.transforms.normalize import draw_shifts
from megavit.data.transforms.random_erasing import Erasing
from megavit.parallel.rng import RandomStream, hash_int64, uniform
from megavit.task.masking import random_keep


def splitmix64(state: int) -> int:
    """Compute SplitMix64's finaliser in unbounded integers, the textbook form."""
    mask = (1 << 64) - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def test_hash_equals_splitmix64_in_unbounded_integers():
    mask = (1 << 64) - 1
    for parts in [(0,), (1, 2, 3), (-1, 7), (2**40, 5)]:
        state = 0
        for part in parts:
            state = splitmix64(((state ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask)
        assert int(hash_int64(*parts)) & mask == state


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours():
    draws = uniform(3, torch.arange(200_000), 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws.float(), 20, 0, 1)
    # 10,000 per bin expected, standard deviation 97.
    assert (counts - 10_000).abs().max() < 500
    centred = draws - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 1e-3


def test_numbers_depend_on_every_part():
    base = int(hash_int64(1, 2, 3))
    assert len({base, int(hash_int64(0, 2, 3)), int(hash_int64(1, 0, 3)), int(hash_int64(1, 3, 2))}) == 4


def test_no_two_random_streams_share_a_number():
    # In an enum a second name of an equal number is an alias, which iteration skips.
    assert len(list(RandomStream)) == len(RandomStream.__members__)


def test_each_stream_gives_the_numbers_of_earlier_versions():
    keys = [SampleKey(3, 1, 0), SampleKey(1_000_003, 2, 1)]
    config = DataConfig(image_size=[32, 32], mixup=0.8, cutmix=1.0, random_erasing=0.9)
    batch = Batch(None, {}, torch.ones(2, dtype=torch.bool), keys, augmented=True)
    assert draw_shifts(keys, pixels=50, seed=7) == [[46, -50], [4, -28]]
    assert ImageTransform(config, augment=True).sample_seeds(keys, seed=7) == [1325491211526856125, 1599069861667705805]
    mix = MixupCutmix(config, seed=7).draw(batch)
    assert mix.share_B.tolist() == pytest.approx([0.2534, 0.2023], abs=5e-5)
    assert [mix.boxes.top.tolist(), mix.boxes.left.tolist()] == [[9, 8], [20, 23]]
    erasing = Erasing(config, seed=7)
    assert erasing.erased(batch).tolist() == [0, 1]
    assert [edge.tolist() for edge in erasing.boxes(batch)] == [[15, 3], [2, 5], [22, 29], [24, 14]]
    kept = random_keep(*batch.key_columns(), 16, num_kept=4, seed=7)
    assert kept.tolist() == [[3, 5, 13, 14], [6, 11, 13, 15]]
    orders = [FeistelPermutation(size, key=(7, 2))(np.arange(6)).tolist() for size in (100, 100_000)]
    assert orders == [[76, 88, 80, 29, 25, 71], [57045, 22439, 59146, 17648, 27735, 72920]]
