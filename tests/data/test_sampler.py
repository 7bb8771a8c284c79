"""The order of training: each sample has its frequency, and no list is stored."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from megavit.data.permutation import FeistelPermutation
from megavit.data.sampler import DeterministicSampler


def test_every_epoch_is_a_permutation_and_no_two_are_equal():
    order = DeterministicSampler(97, seed=5)
    epochs = [[order.at(epoch * 97 + i) for i in range(97)] for epoch in range(3)]
    for number, keys in enumerate(epochs):
        assert sorted(key.sample_id for key in keys) == list(range(97))
        assert {key.epoch for key in keys} == {number}
    ids = [[key.sample_id for key in keys] for keys in epochs]
    assert ids[0] != ids[1] != ids[2]


def test_order_depends_on_the_seed_and_on_nothing_before():
    straight = DeterministicSampler(50, seed=1)
    walked = [straight.at(i) for i in range(120)]
    assert DeterministicSampler(50, seed=1).at(119) == walked[119]
    assert [DeterministicSampler(50, seed=2).at(i) for i in range(50)] != walked[:50]


@pytest.mark.parametrize("size", [1, 2, 3, 97, 4096, 4097, 5000, 65_536, 65_537, 300_001])
def test_a_bijection_takes_every_number_to_another_place(size):
    places = FeistelPermutation(size, key=(3, size))(np.arange(size))
    assert np.array_equal(np.sort(places), np.arange(size))


def test_ten_to_the_ninth_samples_take_no_memory_and_none_comes_twice():
    tracemalloc.start()
    order = DeterministicSampler(10**9, seed=0)
    ids = [order.at(position).sample_id for position in range(10**9 - 30_000, 10**9)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids)) == 30_000
    assert all(0 <= sample_id < 10**9 for sample_id in ids)
    # Two blocks of keys; a permutation would take 8 GB.
    assert peak < 10e6
    # Uniform over the range: 30,000 in ten parts, standard deviation 52.
    assert np.abs(np.histogram(ids, bins=10, range=(0, 10**9))[0] - 3000).max() < 230


def test_neighbours_and_fixed_points_are_as_rare_as_in_a_random_permutation():
    size, trials = 5000, 200
    neighbours = fixed = 0
    for trial in range(trials):
        places = FeistelPermutation(size, key=(1, trial))(np.arange(size))
        neighbours += int((np.abs(np.diff(places)) == 1).sum())
        fixed += int((places == np.arange(size)).sum())
    # Poisson, 2 and 1 expected per trial: standard deviations of the means 0.1 and 0.07.
    assert abs(neighbours / trials - 2) < 0.45
    assert abs(fixed / trials - 1) < 0.32


@pytest.mark.parametrize("num_samples", [10, 11])
def test_repeats_show_each_sample_that_often_and_separate_its_views(num_samples):
    order = DeterministicSampler(num_samples, seed=0, repeats=3)
    assert order.epoch_length == 3 * num_samples
    keys = [order.at(position) for position in range(3 * num_samples)]
    assert sorted((key.sample_id, key.occurrence) for key in keys) == [
        (sample_id, view) for sample_id in range(num_samples) for view in range(3)
    ]
    # With an odd number the last sample has no partner to alternate with.
    alike = [one.sample_id == next_one.sample_id for one, next_one in itertools.pairwise(keys)]
    assert sum(alike) == (0 if num_samples % 2 == 0 else 2)
    assert order.at(3 * num_samples).epoch == 1


def test_balanced_classes_are_equally_frequent_and_every_sample_occurs():
    labels = np.array([0] * 7 + [2] * 20 + [5] * 3)
    order = DeterministicSampler(30, seed=0, labels=labels)
    assert order.epoch_length == 60
    for epoch in range(2):
        keys = [order.at(epoch * 60 + i) for i in range(60)]
        assert {key.epoch for key in keys} == {epoch}
        assert len(set(keys)) == 60
        assert Counter(labels[key.sample_id].item() for key in keys) == {0: 20, 2: 20, 5: 20}
        views = Counter(key.sample_id for key in keys)
        assert set(views) == set(range(30))
        # 20 places for 7 samples: 2 or 3 each; for 3 samples 6 or 7.
        assert {views[sample_id] for sample_id in range(7)} == {2, 3}
        assert {views[sample_id] for sample_id in range(27, 30)} == {6, 7}


def test_balance_and_repeats_together_give_every_view_another_occurrence():
    labels = np.array([0] * 3 + [1] * 8)
    order = DeterministicSampler(11, seed=4, repeats=2, labels=labels)
    keys = [order.at(position) for position in range(order.epoch_length)]
    assert len(set(keys)) == order.epoch_length == 32
    assert Counter(labels[key.sample_id].item() for key in keys) == {0: 16, 1: 16}
