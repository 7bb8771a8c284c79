"""The interface of data sources: required and optional methods."""

from typing import Protocol

import numpy as np
from torch import Tensor

from megavit.data.decode import Jpeg


class Source(Protocol):
    """Images by index, as uint8; labels are read without decoding an image.

    Attributes:
        classes: class names, in label order.
        image_shape: (channels, height, width) of every image; None where they differ.

    A user's class may also declare the class attributes `takes_path` (data.path is required, or not allowed),
    `reads_urls` and `multi_label`; each is checked against the settings where it is declared, True or False. For
    megavit's own sources the table in `registry.py` has them, so that settings are checked before a source is imported.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8."""
        ...

    def label(self, index: int) -> int:
        """Return one label, in [0, number of classes)."""
        ...


def open_sample(source: Source, index: int) -> Tensor | Jpeg:
    """Return one image; not decoded yet if the source has a method `opened`."""
    opened = getattr(source, "opened", None)
    return source.image(index) if opened is None else opened(index)


def all_labels(source: Source) -> np.ndarray:
    """Return the labels of all samples."""
    return np.array([source.label(index) for index in range(len(source))])


def label_set(source: Source, index: int) -> list[int]:
    """Return all labels of a sample, from the source's `labels(index)`."""
    labels: list[int] = source.labels(index)  # type: ignore[attr-defined]
    return labels


def name_of(source: Source, index: int) -> str:
    """Return a sample's name for messages: the source's `name(index)` if it has that method."""
    name = getattr(source, "name", None)
    return name(index) if name is not None else f"sample {index}"
