"""Read images from individual files; the base of all sources that list files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from megavit.data.decode import Jpeg, decode_image, open_image
from megavit.data.sources import remote
from megavit.data.sources.list_files import SUFFIXES, list_images
from megavit.errors import ConfigError, printable


class ImageFileSource:
    """Image files and their labels.

    Args:
        names: paths relative to the folder, absolute paths, or URLs; as bytes of a fixed width (see `as_bytes`).
        labels: one per name, in [0, number of classes); all 0 without classes.
        classes: names, in label order; empty without labels.
        channels: channels of the decoded images.
        folder: base of relative names.
        part: positions of the files to use; None for all. A memory-mapped index is not copied.
        label_sets: all labels of each file, with data.multi_label; `labels` is ignored then.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(
        self,
        names: np.ndarray,
        labels: np.ndarray,
        *,
        classes: tuple[str, ...],
        channels: int,
        folder: Path | None = None,
        part: np.ndarray | None = None,
        label_sets: list[list[int]] | None = None,
    ) -> None:
        self._names, self._labels, self.classes = names, labels, classes
        self._folder, self._channels = b"" if folder is None else os.fsencode(folder), channels
        self._part = np.arange(len(names)) if part is None else part
        self._label_sets = label_sets

    def __len__(self) -> int:
        return len(self._part)

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8, in its original size."""
        return decode_image(self._encoded(index), channels=self._channels, name=self.name(index))

    def opened(self, index: int) -> Tensor | Jpeg:
        """Return one image; a JPEG is not decoded yet."""
        return open_image(self._encoded(index), channels=self._channels, name=self.name(index))

    def label(self, index: int) -> int:
        """Return an image's label."""
        return int(self._labels[self._part[index]])

    def labels(self, index: int) -> list[int]:
        """Return all labels of an image."""
        assert self._label_sets is not None
        return self._label_sets[self._part[index]]

    def label_counts(self) -> np.ndarray:
        """Return the number of images of each class."""
        if self._label_sets is None:
            labels = self._labels[self._part]
        else:
            labels = np.array([label for place in self._part for label in self._label_sets[place]], dtype=np.int64)
        return np.bincount(labels, minlength=len(self.classes))

    def name(self, index: int) -> str:
        """Return an image's path."""
        return printable(self._path(index))

    def _encoded(self, index: int) -> Path | bytes:
        path = self._path(index)
        return remote.read(path) if remote.is_url(path) else Path(path)

    def _path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._folder, bytes(self._names[self._part[index]])))


def as_bytes(names: Sequence[str]) -> np.ndarray:
    """Return names as one array of bytes, as wide as the longest name.

    Every worker would copy a list, and ImageNet has more than a million names. A text array takes four bytes per
    letter, and cannot hold every file name.
    """
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def find_images(path: Path, *, setting: str = "images") -> list[Path]:
    """Return the images in a folder and its subfolders, sorted; or the image that the path names.

    Args:
        path: a folder or an image.
        setting: name of the setting with the path, for the error.

    Raises:
        ConfigError: if there is no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{setting}={path} is neither an image nor a folder")
    found = sorted(path / walked.path / name for walked in list_images(path) for name in walked.images)
    if not found:
        raise ConfigError(f"{setting}={path} holds no image ({', '.join(SUFFIXES)})")
    return found
