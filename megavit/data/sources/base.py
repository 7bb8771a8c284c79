"""The interface of data sources: required and optional methods."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
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
        """Return one image.

        Args:
            index: index of the sample, in [0, len).

        Returns:
            image_CYX, uint8, with `data.channels` channels and any height and width.

        Raises:
            ConfigError: if the image cannot be read; `data.on_bad_sample=skip` then replaces it.
        """
        ...

    def label(self, index: int) -> int:
        """Return one label, in [0, number of classes).

        Args:
            index: index of the sample, in [0, len).
        """
        ...


def open_sample(source: Source, index: int) -> Tensor | Jpeg:
    """Return one image; not decoded yet if the source has a method `opened`.

    Args:
        source: the samples.
        index: index of the sample.

    Returns:
        image_CYX, uint8; or a `Jpeg` whose header has been read.

    Raises:
        ConfigError: if the image cannot be read.
    """
    opened = getattr(source, "opened", None)
    return source.image(index) if opened is None else opened(index)


def all_labels(source: Source) -> np.ndarray:
    """Return the labels of all samples, int64 [samples].

    Args:
        source: the samples; each has one label.
    """
    return np.array([source.label(index) for index in range(len(source))])


def label_set(source: Source, index: int) -> list[int]:
    """Return all labels of a sample, from the source's `labels(index)`.

    Args:
        source: a source with `data.multi_label`.
        index: index of the sample.
    """
    labels: list[int] = source.labels(index)  # type: ignore[attr-defined]
    return labels


def name_of(source: Source, index: int) -> str:
    """Return a sample's name for messages: the source's `name(index)` if it has that method, else its index.

    Args:
        source: the samples.
        index: index of the sample.
    """
    name = getattr(source, "name", None)
    return name(index) if name is not None else f"sample {index}"


def dense_targets(source: Source) -> Mapping[str, torch.dtype]:
    """Return the dense targets of a source by name, with their types: torch.uint8 or torch.int64.

    A source with such targets has an attribute `dense_targets` of this form, and a method `dense_target(index, name)`
    that returns target_YX, a value for each pixel of `image(index)`, of that type.

    Args:
        source: the samples.

    Returns:
        Types by name; empty if the source has no dense targets.
    """
    return getattr(source, "dense_targets", {})


def dense_target(source: Source, index: int, name: str) -> Tensor:
    """Return one sample's dense target, target_YX (see `dense_targets`).

    Args:
        source: a source with this dense target.
        index: index of the sample.
        name: name of the target.
    """
    target: Tensor = source.dense_target(index, name)  # type: ignore[attr-defined]
    return target
