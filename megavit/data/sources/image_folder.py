"""Read images from folders: one folder per class, or images without labels."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megavit.data.config import DataConfig
from megavit.data.sources.image_files import ImageFileSource, as_bytes
from megavit.data.sources.index_cache import Index, load_or_build, settled
from megavit.data.sources.list_files import SUFFIXES, list_images, places_in_order
from megavit.data.sources.train_val_split import SPLIT_WORDS, find_splits, split_indices
from megavit.errors import ConfigError, printable

# Folders that are checked for changes at once.
_THREADS = 16


def open_folder(config: DataConfig, split: str, index: Path | None = None) -> ImageFileSource:
    """Open one split: PATH/train/CLASS/… and PATH/val/CLASS/…, or PATH/CLASS/… with a fraction for validation.

    The split folders may have similar names, Training and Validation for example. A class's folder may have subfolders.
    A class may have no validation images. Class names that are not UTF-8 are escaped.

    Args:
        config: the data group.
        split: `train` or `val`.
        index: folder in which the listing is cached for the next start; None to cache nothing.

    Raises:
        ConfigError: if the folders do not exist, or one is empty.
    """
    root, halves = _halves(config)
    classes = _class_names(halves.get("train", root))
    folder = halves.get(split, root)
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        listed = ", ".join(map(printable, unknown[:5]))
        raise ConfigError(
            f"{printable(str(folder))} has classes that {printable(str(halves['train']))} lacks: {listed}"
        )
    return _open(folder, classes, config, split if halves else None, split=split, index=index)


def open_images(config: DataConfig, split: str, index: Path | None = None) -> ImageFileSource:
    """Open one split of images without labels: those in PATH/train and PATH/val, or a fraction of those in PATH.

    Args:
        config: the data group.
        split: `train` or `val`.
        index: folder in which the listing is cached for the next start; None to cache nothing.

    Raises:
        ConfigError: if there is no image.
    """
    root, halves = _halves(config)
    return _open(halves.get(split, root), (), config, split if halves else None, split=split, index=index)


def _open(
    folder: Path, classes: tuple[str, ...], config: DataConfig, half: str | None, *, split: str, index: Path | None
) -> ImageFileSource:
    """Open a folder's images; if both splits share one set, only the images of this split."""
    about = {"source": config.source, "folder": os.path.abspath(folder), "classes": list(classes)}
    listing = load_or_build(
        index,
        half or "all",
        fits=lambda cached: _is_of(cached, about) and _is_unchanged(folder, cached["changed_ns"]),
        build=partial(_list, folder, classes, about, half),
    )
    names, labels = listing.arrays["names"], listing.arrays["labels"]
    part = None if half else split_indices(labels, config.val_fraction, split, where=str(folder))
    return ImageFileSource(
        names,
        labels,
        classes=tuple(map(printable, classes)),
        channels=config.channels,
        folder=folder,
        part=part,
    )


def _list(folder: Path, classes: tuple[str, ...], about: dict[str, Any], half: str | None) -> Index:
    """List the images in a folder, in order, by class or without classes."""
    paths: list[str] = []
    labels: list[int] = []
    changed_ns: dict[str, int | None] = {}
    places = {name: place for place, name in enumerate(classes)}
    there = [name for name in classes if (folder / name).is_dir()]
    for walked in list_images(folder, start=there if classes else ("",)):
        within = f"{walked.path}/" if walked.path else ""
        paths += [within + name for name in walked.images]
        labels += [places[walked.path.partition("/")[0]] if classes else 0] * len(walked.images)
        changed_ns[walked.path] = settled(walked.changed_ns)
    _refuse_empty(folder, classes, labels, half)
    order = places_in_order(paths)
    return Index(
        {**about, "changed_ns": changed_ns},
        {"names": as_bytes([paths[place] for place in order]), "labels": np.array(labels, dtype=np.int32)[order]},
    )


def _refuse_empty(folder: Path, classes: Sequence[str], labels: list[int], half: str | None) -> None:
    """Raise ConfigError for a folder without images, or a training class without images."""
    if not labels and (not classes or half == "val"):
        raise ConfigError(f"data.path={printable(str(folder))} holds no image ({', '.join(SUFFIXES)})")
    if half == "val":
        return
    filled = set(labels)
    for label, name in enumerate(classes):
        if label not in filled:
            raise ConfigError(
                f"{printable(str(folder / name))} holds no image ({', '.join(SUFFIXES)}); fill it or remove it"
            )


def _is_of(cached: dict[str, Any], about: dict[str, Any]) -> bool:
    return {name: cached.get(name) for name in about} == about


def _is_unchanged(folder: Path, changed_ns: dict[str, int | None]) -> bool:
    """Return whether no listed folder has changed since it was listed."""

    def now(path: str) -> int:
        try:
            return os.stat(os.path.join(folder, path)).st_mtime_ns
        except OSError:
            return -1

    with ThreadPoolExecutor(_THREADS) as pool:
        return all(
            before == after for before, after in zip(changed_ns.values(), pool.map(now, changed_ns), strict=True)
        )


def _halves(config: DataConfig) -> tuple[Path, dict[str, Path]]:
    """Return the folder, and its split folders if it has them."""
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ConfigError(f"data.path={root} is not a folder; data.source={config.source} needs a folder of images")
    folders = _folder_names(root)
    names = find_splits(folders)
    lone = [name for name in folders if name.lower() in ("train", "val")]
    if names is None and lone:
        has = f"only {lone[0]}/" if len(lone) == 1 else " and ".join(f"{name}/" for name in lone)
        raise ConfigError(f"{root} has {has}; both train/ and val/ are needed, each once, or neither")
    if names is not None and config.val_fraction is not None:
        raise ConfigError(
            f"data.val_fraction={config.val_fraction} would be ignored: {root} has {names['train']}/ and "
            f"{names['val']}/; leave it null"
        )
    return root, {half: root / name for half, name in (names or {}).items()}


def _folder_names(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _class_names(root: Path) -> tuple[str, ...]:
    names = _folder_names(root)
    if names and all(name.lower() in SPLIT_WORDS for name in names):
        raise ConfigError(
            f"{root} has {', '.join(f'{name}/' for name in names)}, which are names of splits and not of classes; name "
            f"the two folders train/ and val/, or set data.path to the one with the class folders"
        )
    if len(set(map(printable, names))) < len(names):
        raise ConfigError(f"{root} has two folders whose names are printed as the same; rename one")
    if not names:
        raise ConfigError(
            f"{root} has no class folders; put images into {root}/CLASS/, or use data=images if they have no labels"
        )
    return tuple(names)
