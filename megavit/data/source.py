"""What every data source offers."""

from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """Images by index, as uint8, with labels that cost no decoding.

    Attributes:
        classes: class names, in label order.
        image_shape: (channels, height, width) of every image; None where they differ.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None

    def __len__(self) -> int:
        """Samples."""
        ...

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8."""
        ...

    def label(self, index: int) -> int:
        """One label, in [0, number of classes)."""
        ...
