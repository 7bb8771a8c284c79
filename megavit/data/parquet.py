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
        if not {image, label} <= set(rows.features):
            raise ConfigError(
                f"{path}: the files for validation must have the columns {image} and {label} too, not "
                f"{', '.join(rows.features)}"
            )
        self._rows, self._image = _encoded(rows, image), image
        labels, training_labels = _labels(rows, label, path), _labels(training, label, path)
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
        cell, name = self._rows[row][self._image] or {}, f"{self._path}, row {row}"
        if cell.get("bytes") is not None:
            return decode_image(cell["bytes"], channels=self._channels, name=name)
        if cell.get("path") is None:
            raise ConfigError(f"{name} holds no image; take it away")
        return decode_image(Path(cell["path"]), channels=self._channels, name=f"{name}, {cell['path']}")

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
    import pyarrow  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files={"rows": files}, split="rows")
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, OSError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, (pyarrow.ArrowInvalid, OSError)):
            raise
        raise ConfigError(f"{', '.join(files)} cannot be read as parquet: {cause}; is every file whole?") from error


def _columns(rows: Any, path: Path) -> tuple[str, str]:
    """The names of the one column of images and of the one of labels."""
    import datasets

    features = rows.features
    images = [name for name, feature in features.items() if _holds_images(feature)]
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    whole = [name for name, feature in features.items() if getattr(feature, "dtype", "").startswith(("int", "uint"))]
    labels = named or whole
    if len(images) != 1 or len(labels) != 1:
        raise ConfigError(
            f"{path} must have one column of images and one of labels, not {images} and {labels} of "
            f"{', '.join(features)}"
        )
    return images[0], labels[0]


def _labels(rows: Any, label: str, path: Path) -> np.ndarray:
    """The column of labels, from Arrow at once: through Python's integers it takes 2,000 times as long."""
    column = rows.data.column(label)
    if column.null_count or not len(column):
        raise ConfigError(
            f"{path}: {column.null_count} of {len(column)} rows have no {label}; each image needs one, and there must "
            f"be some"
        )
    return column.to_numpy().astype(np.int64)


def _encoded(rows: Any, image: str) -> Any:
    """The same rows, their images left as they lie in the file."""
    import datasets

    if not isinstance(rows.features[image], datasets.Image):
        return rows
    return rows.cast_column(image, datasets.Image(decode=False))


def _holds_images(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
