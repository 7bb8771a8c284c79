import torch

from megavit.parallel.rng import hash_int64, uniform


def splitmix64(state: int) -> int:
    """SplitMix64's finaliser in unbounded integers, the textbook form."""
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


def test_uniform_draws_are_uniform_and_independent_of_their_neighbours():
    draws = uniform(3, torch.arange(200_000), 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws.float(), 20, 0, 1)
    # 10,000 per bin expected, standard deviation 97.
    assert (counts - 10_000).abs().max() < 500
    centred = draws - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 1e-3


def test_draws_depend_on_every_part():
    base = int(hash_int64(1, 2, 3))
    assert len({base, int(hash_int64(0, 2, 3)), int(hash_int64(1, 0, 3)), int(hash_int64(1, 3, 2))}) == 4
