"""Images that lie in files of their own: what every source that lists files has in common."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from megavit.data.decode import Jpeg, decode_image, open_image
from megavit.errors import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".npy")


class ImageFiles:
    """Image files and their labels.

    Args:
        names: paths.
        labels: theirs, in [0, number of classes); without classes all 0.
        classes: names, in label order; empty where nothing is labelled.
        channels: that each image is to have.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(
        self, names: list[str] | np.ndarray, labels: list[int] | np.ndarray, *, classes: tuple[str, ...], channels: int
    ) -> None:
        # Arrays, not lists: they are copied into every worker, and ImageNet has more than a million rows.
        self.names, self.labels = np.asarray(names), np.asarray(labels)
        self.classes, self._channels = classes, channels

    def part(self, indices: np.ndarray) -> "ImageFiles":
        """Some of the files, under the same classes."""
        return ImageFiles(self.names[indices], self.labels[indices], classes=self.classes, channels=self._channels)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8, of its natural size."""
        path = Path(str(self.names[index]))
        return decode_image(path, channels=self._channels, name=str(path))

    def opened(self, index: int) -> Tensor | Jpeg:
        """The same, a JPEG not decoded yet."""
        path = Path(str(self.names[index]))
        return open_image(path, channels=self._channels, name=str(path))

    def label(self, index: int) -> int:
        """Its label."""
        return int(self.labels[index])


def images_within(folder: Path, *, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """The paths of the images in a folder and in the folders within, hidden ones left away, in no order.

    Links are followed, but for one that leads back to a folder it lies in.

    Args:
        folder: to look in.
        above: the true paths of the folders that it lies in.
    """
    true = os.path.realpath(folder)
    if true in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from images_within(Path(entry.path), above=above | {true})
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted by the files' own names, numbers in them as numbers, then by folder.

    Files that were numbered when they were exported from a table come in the table's order, whatever folder they are
    in, so that both give the same run.
    """
    return sorted(names, key=lambda path: (_parts(os.path.basename(path)), path))


def _parts(name: str) -> list[str | int]:
    # Text and numbers take turns, so that like is compared with like.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def find_images(path: Path, *, setting: str = "images") -> list[Path]:
    """The images in a folder and in the folders within, sorted; or the one image that the path is.

    Args:
        path: a folder or an image.
        setting: that gave the path, for the error.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{setting}={path} is neither an image nor a folder")
    found = sorted(map(Path, images_within(path)))
    if not found:
        raise ConfigError(f"{setting}={path} holds no image ({', '.join(SUFFIXES)})")
    return found
