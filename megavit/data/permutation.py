"""Shuffle without a list: compute a permutation for each number separately.

Shapes: N numbers.
"""

import numpy as np

from megavit.parallel.rng import SPLITMIX64

_INCREMENT, _MIX_1, _MIX_2 = map(np.uint64, SPLITMIX64)

# Four rounds make a random permutation of a large domain. An even number puts halves of unequal width back in place.
_ROUNDS = 6

# Up to this size a list is shuffled: in a domain of 3 bits some orders were ten times too frequent, and in a domain
# that is much larger than the size cycle walking takes too many steps.
_LISTED = 4096


class FeistelPermutation:
    """A random permutation of 0 to n − 1 without memory: a Feistel network with cycle walking.

    Args:
        size: n, at least 1.
        key: numbers that select the permutation.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """

    def __init__(self, size: int, *, key: tuple[int, ...]) -> None:
        assert size > 0
        self._size = np.uint64(size)
        state = np.zeros(1, dtype=np.uint64)
        for part in key:
            state = _finalise(state ^ np.uint64(part))
        if size <= _LISTED:
            self._list = np.random.Generator(np.random.Philox(key=int(state[0]))).permutation(size)
            return
        # The smallest power of two of at least n, so that fewer than half of the values are walked over.
        bits = (size - 1).bit_length()
        self._widths = bits // 2, bits - bits // 2
        self._round_keys = [_finalise(state + np.uint64(number)) for number in range(_ROUNDS)]

    def __call__(self, numbers_N: np.ndarray) -> np.ndarray:
        """Return the permuted numbers, int64.

        Args:
            numbers_N: integers in [0, n).
        """
        if self._size <= _LISTED:
            return self._list[numbers_N]
        places_N = self._once(numbers_N.astype(np.uint64))
        outside_N = places_N >= self._size
        while outside_N.any():
            places_N[outside_N] = self._once(places_N[outside_N])
            outside_N = places_N >= self._size
        return places_N.astype(np.int64)

    def _once(self, numbers_N: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._widths
        left_N, right_N = numbers_N >> np.uint64(right_bits), numbers_N & _ones(right_bits)
        for round_key in self._round_keys:
            left_N, right_N = right_N, left_N ^ (_finalise(right_N ^ round_key) & _ones(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left_N << np.uint64(right_bits)) | right_N


def _finalise(x_N: np.ndarray) -> np.ndarray:
    x_N = x_N + _INCREMENT
    x_N = (x_N ^ (x_N >> np.uint64(30))) * _MIX_1
    x_N = (x_N ^ (x_N >> np.uint64(27))) * _MIX_2
    return x_N ^ (x_N >> np.uint64(31))


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
