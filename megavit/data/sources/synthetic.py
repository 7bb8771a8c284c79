"""Generate noise images with labels, of any size and number, to test layouts and time steps without data."""

import torch
from torch import Tensor

from megavit.data.config import DataConfig


class Synthetic:
    """Images of uniform noise; each is a function of its index.

    Args:
        config: the data group, with shape, number of classes and number of samples.
        split: `train`, or `val`, which has a hundredth of the samples.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        assert config.num_classes is not None
        assert config.num_samples is not None
        self.classes = tuple(map(str, range(config.num_classes)))
        self._shape = (config.channels, *config.image_size)
        self.image_shape: tuple[int, ...] | None = self._shape
        self._num_samples = config.num_samples if split == "train" else max(1, config.num_samples // 100)

    def __len__(self) -> int:
        return self._num_samples

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, self._shape, dtype=torch.uint8, generator=generator)

    def label(self, index: int) -> int:
        """Return the index modulo the number of classes."""
        return index % len(self.classes)
