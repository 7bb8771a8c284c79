"""Which sample stands where: the order of training as a pure function of (seed, position)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SampleKey:
    """What identifies one view of one sample; augmentation draws from it and from nothing else.

    Attributes:
        sample_id: the sample's index in the source.
        epoch: how often the whole source was seen before.
        occurrence: separates repeated views of a sample within an epoch; 0 for the first.
    """

    sample_id: int
    epoch: int
    occurrence: int = 0


class SampleOrder:
    """The endless sequence of training samples: one permutation per epoch, end to end.

    Position q is the (q mod n)-th of epoch q div n, whatever the batch size, the number of ranks or of workers; so
    a batch may straddle two epochs, and a run that continues at its count of consumed samples repeats and skips none.

    Args:
        num_samples: n.
        seed: `run.seed`.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        assert num_samples > 0
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def at(self, position: int) -> SampleKey:
        """The sample at a position, counted in consumed samples from the start of training."""
        epoch, index = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._permutation, self._epoch = generator.permutation(self.num_samples), epoch
        return SampleKey(int(self._permutation[index]), epoch)

    def first(self, count: int) -> list[int]:
        """The ids of the first samples of training, at most all of them: a random choice, the same in every layout."""
        return [self.at(position).sample_id for position in range(min(count, self.num_samples))]
