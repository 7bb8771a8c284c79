"""Compute the order of training samples, a pure function of (seed, position)."""

from dataclasses import dataclass

import numpy as np
import torch

from megavit.data.permutation import FeistelPermutation
from megavit.parallel.rng import hash_int64

# Number of positions that are computed at once.
_BLOCK = 4096


@dataclass(frozen=True)
class SampleKey:
    """The identity of one view of a sample; with the seed it determines the view's augmentation.

    Attributes:
        sample_id: the sample's index in the source.
        epoch: number of complete passes before this one.
        occurrence: separates repeated views of a sample within an epoch; 0 for the first.
    """

    sample_id: int
    epoch: int
    occurrence: int = 0


class DeterministicSampler:
    """The endless sequence of training samples: one permutation per epoch, one after the other.

    Position q is the (q mod n)-th sample of epoch q div n, for every batch size and number of ranks or workers. A batch
    may span two epochs, and a run that resumes at its count of consumed samples repeats and skips none. The permutation
    is not stored: a billion samples take as much memory as a thousand.

    With repeats, an epoch is `repeats` times longer, and the views of two samples alternate. With labels, all classes
    are as frequent as the largest; each sample occurs at least once per epoch.

    Args:
        num_samples: number of samples in the source.
        seed: `run.seed`.
        repeats: number of consecutive views of a sample.
        labels: labels of all samples, to balance the classes; None for no balancing.

    Source: repeated views, arXiv 1901.09335.
    """

    def __init__(self, num_samples: int, *, seed: int, repeats: int = 1, labels: np.ndarray | None = None) -> None:
        assert num_samples > 0
        self.num_samples, self.seed, self.repeats = num_samples, seed, repeats
        self._labels: np.ndarray | None = None
        self._num_chosen = num_samples
        if labels is not None:
            # The samples sorted by class; where each class begins, and its size.
            self._members = np.argsort(labels, kind="stable")
            self._labels, self._starts, self._counts = np.unique(
                labels[self._members], return_index=True, return_counts=True
            )
            self._num_chosen = len(self._counts) * int(self._counts.max())
        self._first, self._block = -1, list[SampleKey]()

    @property
    def epoch_length(self) -> int:
        """Return the number of positions per epoch: all views, including those that balance the classes."""
        return self._num_chosen * self.repeats

    def at(self, position: int) -> SampleKey:
        """Return the sample at a position, counted in consumed samples from the start of training."""
        first = position - position % _BLOCK
        if first != self._first:
            self._first, self._block = first, self._keys(np.arange(first, first + _BLOCK))
        return self._block[position - first]

    def first(self, count: int) -> list[int]:
        """Return the ids of the first `count` samples of the training order, the same in every layout."""
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
        """Return positions in the permutation, and the repeat: a b a b a b, so that neighbours are two samples."""
        pair, turn = np.divmod(within, 2 * self.repeats)
        alone = 2 * pair + 1 == self._num_chosen
        return np.where(alone, 2 * pair, 2 * pair + turn % 2), np.where(alone, turn, turn // 2)

    def _balance(self, chosen: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sample ids, and the number of earlier repeats of each in this epoch, made by balancing."""
        if self._labels is None:
            return chosen, np.zeros_like(chosen)
        turns, classes = np.divmod(chosen, len(self._labels))
        sizes = self._counts[classes]
        # Each epoch starts at other samples, so that the extra repeats change.
        begins = hash_int64(self.seed, epoch, torch.from_numpy(classes)).numpy() % sizes
        return self._members[self._starts[classes] + (begins + turns) % sizes], turns // sizes
