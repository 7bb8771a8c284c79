"""Images in folders: one folder per class, as ImageNet lies on most disks, or without labels."""

import os
from pathlib import Path

import numpy as np

from megavit.data.config import DataConfig
from megavit.data.files import SUFFIXES, ImageFiles, find_images, images_within, in_order
from megavit.data.split import split_indices
from megavit.errors import ConfigError


def open_folder(config: DataConfig, split: str) -> ImageFiles:
    """One split of a folder: PATH/train/CLASS/… and PATH/val/CLASS/…, or PATH/CLASS/… with a share to validate on.

    Within a class's folder images may lie in folders of their own.

    Args:
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if the folders are not there, or one is empty.
    """
    root, halves = _halves(config)
    classes = _class_names(halves.get("train", root))
    folder = halves.get(split, root)
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise ConfigError(f"{folder} has classes that {halves['train']} has not: {', '.join(unknown[:5])}")
    labels: dict[str, int] = {}
    for label, name in enumerate(classes):
        found = dict.fromkeys(images_within(folder / name) if (folder / name).is_dir() else (), label)
        if not found:
            raise ConfigError(f"{folder / name} holds no image ({', '.join(SUFFIXES)}); fill it or remove it")
        labels |= found
    names = in_order(labels)
    files = ImageFiles(names, [labels[name] for name in names], classes=classes, channels=config.channels)
    return files if halves else _share(files, config, split, root)


def open_images(config: DataConfig, split: str) -> ImageFiles:
    """One split of images without labels: those under PATH/train and PATH/val, or a share of those under PATH.

    Args:
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if there is no image.
    """
    root, halves = _halves(config)
    names = in_order(map(str, find_images(halves.get(split, root), setting="data.path")))
    files = ImageFiles(names, np.zeros(len(names), dtype=int), classes=(), channels=config.channels)
    return files if halves else _share(files, config, split, root)


def _halves(config: DataConfig) -> tuple[Path, dict[str, Path]]:
    """The folder, and its train/ and val/ where it has them."""
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ConfigError(f"data.path={root} is no folder; data.source={config.source} needs a folder of images")
    halves = {half: root / half for half in ("train", "val") if (root / half).is_dir()}
    if len(halves) == 1:
        raise ConfigError(f"{root} has {next(iter(halves))}/ alone; both train/ and val/ are needed, or neither")
    if halves and config.val_fraction is not None:
        raise ConfigError(
            f"data.val_fraction={config.val_fraction} would be ignored: {root} has train/ and val/; leave it null"
        )
    return root, halves


def _share(files: ImageFiles, config: DataConfig, split: str, root: Path) -> ImageFiles:
    return files.part(split_indices(files.labels, config.val_fraction, split, where=str(root)))


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ConfigError(
            f"{root} has no class folders; images belong into {root}/CLASS/. Without labels they are data=images"
        )
    return tuple(names)
