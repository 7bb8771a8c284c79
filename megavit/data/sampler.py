"""Which sample stands where: the order of training as a pure function of (seed, position)."""

from dataclasses import dataclass

import numpy as np
import torch

from megavit.data.permutation import FeistelPermutation
from megavit.parallel.rng import hash_int64

# Positions looked up at once.
_BLOCK = 4096


@dataclass(frozen=True)
class SampleKey:
    """What identifies one view of one sample; augmentation draws from it and from nothing else.

    Attributes:
        sample_id: the sample's index in the source.
        epoch: how often the whole order was gone through before.
        occurrence: separates repeated views of a sample within an epoch; 0 for the first.
    """

    sample_id: int
    epoch: int
    occurrence: int = 0


class DeterministicSampler:
    """The endless sequence of training samples: one permutation per epoch, end to end.

    Position q is the (q mod n)-th of epoch q div n, whatever the batch size, the number of ranks or of workers; so
    a batch may straddle two epochs, and a run that continues at its count of consumed samples repeats and skips none.
    No permutation lies in memory: a billion samples take as much as a thousand.

    With repeats each sample comes several times in an epoch that is as many times longer, the views of two samples
    taking turns. Balanced, each class comes as often as the largest, its samples in turn, each at least once.

    Args:
        num_samples: in the source.
        seed: `run.seed`.
        repeats: views of a sample in succession.
        labels: of all samples, to balance their classes; None takes each sample as often as any other.

    Source: repeated views, arXiv 1901.09335.
    """

    def __init__(self, num_samples: int, *, seed: int, repeats: int = 1, labels: np.ndarray | None = None) -> None:
        assert num_samples > 0
        self.num_samples, self.seed, self.repeats = num_samples, seed, repeats
        self._labels: np.ndarray | None = None
        self._num_chosen = num_samples
        if labels is not None:
            # Each class's samples in a row, where its row begins, and how long it is.
            self._members = np.argsort(labels, kind="stable")
            self._labels, self._starts, self._counts = np.unique(
                labels[self._members], return_index=True, return_counts=True
            )
            self._num_chosen = len(self._counts) * int(self._counts.max())
        self._first, self._block = -1, list[SampleKey]()

    @property
    def epoch_length(self) -> int:
        """Positions of one epoch: each sample's views, and those that make all classes as large as the largest."""
        return self._num_chosen * self.repeats

    def at(self, position: int) -> SampleKey:
        """The sample at a position, counted in consumed samples from the start of training."""
        first = position - position % _BLOCK
        if first != self._first:
            self._first, self._block = first, self._keys(np.arange(first, first + _BLOCK))
        return self._block[position - first]

    def first(self, count: int) -> list[int]:
        """The ids of the first samples of training, at most all of them: a random choice, the same in every layout."""
        return [self.at(position).sample_id for position in range(min(count, self.num_samples))]

    def _keys(self, positions: np.ndarray) -> list[SampleKey]:
        keys: list[SampleKey] = []
        epochs, within = np.divmod(positions, self.epoch_length)
        for epoch in np.unique(epochs).tolist():
            places, repeat = self._take_turns(within[epochs == epoch])
            chosen = FeistelPermutation(self._num_chosen, key=(self.seed, epoch))(places)
            sample_ids, occurrence = self._balance(chosen, epoch)
            occurrences = occurrence * self.repeats + repeat
            views = zip(sample_ids.tolist(), occurrences.tolist(), strict=True)
            keys += [SampleKey(sample_id, epoch, occurrence) for sample_id, occurrence in views]
        return keys

    def _take_turns(self, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the epoch's permutation, and which repeat: a b a b a b, so that neighbours are two samples."""
        pair, turn = np.divmod(within, 2 * self.repeats)
        alone = 2 * pair + 1 == self._num_chosen
        return np.where(alone, 2 * pair, 2 * pair + turn % 2), np.where(alone, turn, turn // 2)

    def _balance(self, chosen: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids, and how often each came before for its class's sake."""
        if self._labels is None:
            return chosen, np.zeros_like(chosen)
        turns, classes = np.divmod(chosen, len(self._labels))
        sizes = self._counts[classes]
        # In each epoch others are the ones that come once more.
        begins = hash_int64(self.seed, epoch, torch.from_numpy(classes)).numpy() % sizes
        return self._members[self._starts[classes] + (begins + turns) % sizes], turns // sizes
