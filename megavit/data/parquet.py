"""Images in parquet files, laid out as on the Hugging Face hub, read through `datasets` without filling memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.decode import decode_image
from megavit.data.split import split_indices
from megavit.errors import ConfigError

_VALIDATION_NAMES = ("val", "validation", "test")


class Parquet:
    """One split of a folder of parquet files, told by their names, or of one file with a share to validate on.

    Args:
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if no file, or no image or label column, is found.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(self, config: DataConfig, split: str) -> None:
        assert config.path is not None
        path, self._channels = Path(config.path), config.channels
        files = _files_by_split(path)
        if "train" in files and config.val_fraction is not None:
            raise ConfigError(
                f"data.val_fraction={config.val_fraction} would be ignored: {path} has files for training and for "
                f"validation; leave it null"
            )
        self._path = path
        training = _open(files.get("train", files.get("all", [])))
        image, label = _columns(training, path)
        rows = training if split == "train" or "all" in files else _open(files["val"])
        self._rows, self._image = _encoded(rows, image), image
        labels, training_labels = np.array(rows[label]), np.array(training[label])
        names = getattr(training.features[label], "names", None)
        self.classes = tuple(names or map(str, range(int(training_labels.max()) + 1)))
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise ConfigError(
                f"{path}: labels go from {labels.min()} to {labels.max()}, and there are {len(self.classes)} classes"
            )
        part = np.arange(len(labels))
        if "all" in files:
            part = split_indices(labels, config.val_fraction, split, where=str(path))
        self._part, self._labels = part, labels[part]

    def __len__(self) -> int:
        return len(self._part)

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8, of its natural size."""
        row = int(self._part[index])
        cell = self._rows[row][self._image]
        encoded = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])
        return decode_image(encoded, channels=self._channels, name=f"{self._path}, row {row}")

    def label(self, index: int) -> int:
        """The row's label."""
        return int(self._labels[index])


def _files_by_split(path: Path) -> dict[str, list[str]]:
    """Files of `train` and `val`, or of `all` where there is one set."""
    if path.is_file():
        return {"all": [str(path)]}
    if not path.is_dir():
        raise ConfigError(f"data.path={path} is neither a folder nor a parquet file")
    every = sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".parquet"))
    training = [name for name in every if "train" in Path(name).name]
    for word in _VALIDATION_NAMES:
        validation = [name for name in every if word in Path(name).name and name not in training]
        if training and validation:
            return {"train": training, "val": validation}
    raise ConfigError(
        f"{path} needs parquet files with 'train' in their names and others with 'val', 'validation' or 'test'; it has "
        f"{', '.join(Path(name).name for name in every) or 'none'}. One file alone is given as data.path=FILE with "
        f"data.val_fraction"
    )


def _open(files: list[str]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files={"rows": files}, split="rows")


def _columns(rows: Any, path: Path) -> tuple[str, str]:
    """The names of the one column of images and of the one of labels."""
    import datasets

    features = rows.features
    images = [name for name, feature in features.items() if _holds_images(feature)]
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    whole = [name for name, feature in features.items() if getattr(feature, "dtype", "").startswith("int")]
    labels = named or whole
    if len(images) != 1 or len(labels) != 1:
        raise ConfigError(
            f"{path} must have one column of images and one of labels, not {images} and {labels} of "
            f"{', '.join(features)}"
        )
    return images[0], labels[0]


def _encoded(rows: Any, image: str) -> Any:
    """The same rows, their images left as they lie in the file."""
    import datasets

    if not isinstance(rows.features[image], datasets.Image):
        return rows
    return rows.cast_column(image, datasets.Image(decode=False))


def _holds_images(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
