"""What every data source offers."""

from typing import Protocol

from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.digits import Digits


class Source(Protocol):
    """Images by index, as uint8, with labels that cost no decoding.

    Attributes:
        classes: class names, in label order.
    """

    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Samples."""
        ...

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8."""
        ...

    def label(self, index: int) -> int:
        """One label, in [0, number of classes)."""
        ...


def open_source(config: DataConfig, split: str) -> Source:
    """Open the data that the configuration names.

    Args:
        config: the data group, checked.
        split: `train` or `val`.
    """
    assert config.source == "digits"
    return Digits(split)
