"""Read images from WebDataset tar shards, in any order, through an index."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import numpy as np
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.decode import Jpeg, decode_image, open_image
from megavit.data.sources import remote
from megavit.data.sources.image_files import as_bytes
from megavit.data.sources.index_cache import Index, load_or_build
from megavit.data.sources.list_files import places_in_order
from megavit.data.sources.tar_index import Placed, read_headers
from megavit.data.sources.tar_shards import Shard, ShardReader, beside, find_shards, look_at, open_shard
from megavit.data.sources.train_val_split import split_indices
from megavit.errors import ConfigError, printable

_CLASSES_FILE = "classes.txt"

# Shards whose headers are read at once; the threads wait for disk or network.
_THREADS = 16


class WebDatasetSource:
    """Some of the images in tar shards.

    Args:
        shards: the tars.
        index: location of each image (see `index_shards`).
        classes: names, in label order; empty without labels.
        channels: channels of the decoded images.
        part: positions of the images to use; None for all.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(
        self,
        shards: list[Shard],
        index: Index,
        *,
        classes: tuple[str, ...],
        channels: int,
        part: np.ndarray | None = None,
    ) -> None:
        self._shards, self._columns = ShardReader(shards), index.arrays
        self.classes, self._channels = classes, channels
        self._part = np.arange(len(self._columns["labels"])) if part is None else part

    def __len__(self) -> int:
        return len(self._part)

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8, in its original size."""
        return decode_image(self._encoded(index), channels=self._channels, name=self.name(index))

    def opened(self, index: int) -> Tensor | Jpeg:
        """Return one image; a JPEG is not decoded yet."""
        return open_image(self._encoded(index), channels=self._channels, name=self.name(index))

    def _encoded(self, index: int) -> bytes:
        place = self._part[index]
        shard, offset, size = (int(self._columns[name][place]) for name in ("shards", "offsets", "sizes"))
        return self._shards.read(shard, offset, size)

    def label(self, index: int) -> int:
        """Return an image's label; 0 without labels."""
        return max(0, int(self._columns["labels"][self._part[index]]))

    def label_counts(self) -> np.ndarray:
        """Return the number of images of each class; empty without labels."""
        labels = self._columns["labels"][self._part]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes))

    def name(self, index: int) -> str:
        """Return an image's shard and member."""
        place = self._part[index]
        shard = self._shards.shards[int(self._columns["shards"][place])]
        return f"{printable(shard.path)}, {printable(bytes(self._columns['names'][place]))}"


def open_tars(config: DataConfig, split: str, index: Path | None = None) -> WebDatasetSource:
    """Open one split of tar shards: by folder (PATH/train/, PATH/val/), by file name, or as a fraction of one set.

    PATH is a folder, a tar or a text file with a tar per line; each may be a URL. Class names are the lines of a
    classes.txt next to the shards; without it they are the numbers up to the training set's largest label.

    Args:
        config: the data group.
        split: `train` or `val`.
        index: folder in which the listing is cached for the next start; None to cache nothing.

    Raises:
        ConfigError: if there is no shard, one cannot be read, or the labels do not fit.
    """
    assert config.path is not None
    parts = find_shards(config.path)
    if "train" in parts and config.val_fraction is not None:
        raise ConfigError(
            f"data.val_fraction={config.val_fraction} would be ignored: {config.path} has shards for training and for "
            f"validation; leave it null"
        )
    part = "all" if "all" in parts else split
    opened = {part: _open_part(parts[part], part, index)}
    labels = opened[part][1].arrays["labels"]
    names = _class_names(config.path)
    if names is None:
        # Both splits must count the same classes: the training set's.
        training = "all" if "all" in parts else "train"
        _, listing = opened.get(training) or _open_part(parts[training], training, index)
        names = tuple(map(str, range(int(listing.arrays["labels"].max()) + 1)))
    elif labels.max() < 0:
        raise ConfigError(f"{config.path} has a {_CLASSES_FILE}, and its images have no labels; remove it")
    if (labels.max() < 0) != (not names) or labels.max() >= len(names):
        name = "training" if split == "train" else "validation"
        message = f"has labels up to {labels.max()}" if labels.max() >= 0 else "has no labels"
        raise ConfigError(f"{config.path}: the {name} set {message}, and there are {len(names)} classes")
    share = split_indices(labels.clip(0), config.val_fraction, split, where=config.path) if part == "all" else None
    shards, listing = opened[part]
    return WebDatasetSource(shards, listing, classes=names, channels=config.channels, part=share)


def _open_part(paths: list[str], name: str, folder: Path | None) -> tuple[list[Shard], Index]:
    shards = look_at(paths)
    about = {"source": "tar", "shards": [list(astuple(shard)) for shard in shards]}
    is_settled = all(shard.version is not None for shard in shards)
    return shards, load_or_build(
        folder,
        name,
        fits=lambda cached: is_settled and cached == about,
        build=lambda: Index(about, index_shards(paths)),
    )


def index_shards(paths: list[str]) -> dict[str, np.ndarray]:
    """Return names, shards, offsets, sizes and labels (−1 for none) of all images, in order.

    Raises:
        ConfigError: if a shard cannot be read, if no shard has an image, or if only some images have labels.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_read_shard, paths))
    every = [(number, placed) for number, shard in enumerate(found) for placed in shard]
    if not every:
        raise ConfigError(f"{', '.join(paths[:5])}: no image in {len(paths)} shards")
    by_kind = {placed.label is None: (number, placed) for number, placed in every}
    if len(by_kind) == 2:
        without, with_label = (f"{paths[number]}, {placed.name}" for number, placed in (by_kind[True], by_kind[False]))
        raise ConfigError(f"{without} has no label, and {with_label} has one; label all, or none")
    every = [every[place] for place in places_in_order([placed.name for _, placed in every])]
    return {
        "names": as_bytes([placed.name for _, placed in every]),
        "shards": np.array([number for number, _ in every], dtype=np.int32),
        "offsets": np.array([placed.offset for _, placed in every], dtype=np.int64),
        "sizes": np.array([placed.size for _, placed in every], dtype=np.int64),
        "labels": np.array([-1 if placed.label is None else placed.label for _, placed in every], dtype=np.int32),
    }


def _read_shard(path: str) -> list[Placed]:
    with open_shard(path) as file:
        return read_headers(file, printable(path))


def _class_names(path: str) -> tuple[str, ...] | None:
    """Return the lines of classes.txt next to the shards; None if there is no such file."""
    file = beside(path, _CLASSES_FILE)
    try:
        if remote.is_url(file):
            content = remote.read(file) if remote.exists(file) else None
        else:
            content = Path(file).read_bytes() if os.path.exists(file) else None
        if content is None:
            return None
        names = tuple(line.strip() for line in content.decode("utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text in UTF-8: {error}") from error
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"{file} must name each class once, one per line, in the order of their labels")
    return names
