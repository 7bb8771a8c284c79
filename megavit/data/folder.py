"""Images in folders, one folder per class, as ImageNet lies on most disks."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.decode import decode_image
from megavit.data.split import split_indices
from megavit.errors import ConfigError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Folder:
    """One split of a folder: PATH/train/CLASS/… and PATH/val/CLASS/…, or PATH/CLASS/… with a share to validate on.

    Within a class's folder images may lie in folders of their own.

    Args:
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if the folders are not there, or one is empty.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(self, config: DataConfig, split: str) -> None:
        assert config.path is not None
        root, self._channels = Path(config.path), config.channels
        if not root.is_dir():
            raise ConfigError(f"data.path={root} is no folder; data.source=folder needs a folder of class folders")
        halves = {half: root / half for half in ("train", "val") if (root / half).is_dir()}
        if len(halves) == 1:
            raise ConfigError(f"{root} has {next(iter(halves))}/ alone; both train/ and val/ are needed, or neither")
        if halves and config.val_fraction is not None:
            raise ConfigError(
                f"data.val_fraction={config.val_fraction} would be ignored: {root} has train/ and val/; leave it null"
            )
        self.classes = _class_names(halves.get("train", root))
        self._root = halves.get(split, root)
        unknown = sorted(set(_class_names(self._root)) - set(self.classes))
        if unknown:
            raise ConfigError(f"{self._root} has classes that {halves['train']} has not: {', '.join(unknown[:5])}")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            found = sorted(_images(self._root / name)) if (self._root / name).is_dir() else []
            if not found:
                raise ConfigError(f"{self._root / name} holds no image ({', '.join(_SUFFIXES)}); fill it or remove it")
            names += found
            labels += [label] * len(found)
        # Arrays, not lists: they are copied into every worker, and ImageNet has more than a million rows.
        self._names, self._labels = np.array(names), np.array(labels)
        if not halves:
            part = split_indices(self._labels, config.val_fraction, split, where=str(root))
            self._names, self._labels = self._names[part], self._labels[part]

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8, of its natural size."""
        path = Path(str(self._names[index]))
        return decode_image(path, channels=self._channels, name=str(path))

    def label(self, index: int) -> int:
        """The class's place among the sorted names."""
        return int(self._labels[index])


def find_images(path: Path) -> list[Path]:
    """The images in a folder and in the folders within, sorted; or the one image that the path is.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"images={path} is neither an image nor a folder")
    found = sorted(map(Path, _images(path)))
    if not found:
        raise ConfigError(f"images={path} holds no image ({', '.join(_SUFFIXES)})")
    return found


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ConfigError(f"{root} has no class folders; images belong into {root}/CLASS/")
    return tuple(names)


def _images(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(Path(entry.path))
        elif entry.name.lower().endswith(_SUFFIXES):
            yield entry.path
