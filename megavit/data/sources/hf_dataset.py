"""Read images from tables that Hugging Face `datasets` memory-maps.

The tables are parquet files, a folder written by `save_to_disk`, or a dataset of the hub.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megavit.data.class_names import describe_change
from megavit.data.config import DataConfig
from megavit.data.decode import Jpeg, open_image
from megavit.data.sources.train_val_split import find_splits, parts_by_name, split_indices
from megavit.errors import DISK_ERRORS, ConfigError


class HfDatasetSource:
    """One split of tables with a column of images and, if the images are labelled, one of labels.

    Args:
        tables: `train` and `val`, or `all` with a fraction for validation.
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if no image column is found, or the labels do not fit.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(self, tables: dict[str, Any], config: DataConfig, split: str) -> None:
        self._where, self._channels = str(config.path), config.channels
        if "train" in tables and config.val_fraction is not None:
            raise ConfigError(
                f"data.val_fraction={config.val_fraction} would be ignored: {self._where} has rows for training and "
                f"for validation; leave it null"
            )
        training = tables["train" if "train" in tables else "all"]
        image, label = _columns(training, self._where, several=config.multi_label)
        rows = training if split == "train" or "all" in tables else tables["val"]
        if not {image, label or image} <= set(rows.features):
            raise ConfigError(
                f"{self._where}: the rows for validation must have the columns {image} and {label} too, not "
                f"{', '.join(rows.features)}"
            )
        if label is not None:
            _refuse_other_names(training.features[label], rows.features[label], self._where)
        self._rows, self._image = _encoded(rows, image), image
        self.classes: tuple[str, ...] = ()
        labels = np.zeros(len(rows), dtype=np.int64)
        self._label_sets: list[list[int]] = []
        if label is not None and config.multi_label:
            self.classes, self._label_sets = _several_labels(training, rows, label, self._where)
        elif label is not None:
            labels, training_labels = _labels(rows, label, self._where), _labels(training, label, self._where)
            names = getattr(training.features[label], "names", None)
            self.classes = tuple(names or map(str, range(int(training_labels.max()) + 1)))
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ConfigError(
                    f"{self._where}: labels go from {labels.min()} to {labels.max()}, and there are "
                    f"{len(self.classes)} classes"
                )
        part = np.arange(len(labels))
        if "all" in tables:
            part = split_indices(labels, config.val_fraction, split, where=self._where)
        self._part, self._labels = part, labels[part]

    def __len__(self) -> int:
        return len(self._part)

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8, in its original size."""
        image = self.opened(index)
        return image.decode() if isinstance(image, Jpeg) else image

    def opened(self, index: int) -> Tensor | Jpeg:
        """Return one image; a JPEG is not decoded yet."""
        cell, name = self._rows[int(self._part[index])][self._image] or {}, self.name(index)
        if cell.get("bytes") is not None:
            return open_image(cell["bytes"], channels=self._channels, name=name)
        if cell.get("path") is None:
            raise ConfigError(f"{name} has no image; remove it")
        return open_image(Path(cell["path"]), channels=self._channels, name=f"{name}, {cell['path']}")

    def label(self, index: int) -> int:
        """Return the row's label."""
        return int(self._labels[index])

    def labels(self, index: int) -> list[int]:
        """Return all labels of the row."""
        return self._label_sets[self._part[index]]

    def label_counts(self) -> np.ndarray:
        """Return the number of images of each class."""
        labels = self._labels
        if self._label_sets:
            labels = np.array([label for place in self._part for label in self._label_sets[place]], dtype=np.int64)
        return np.bincount(labels, minlength=len(self.classes))

    def name(self, index: int) -> str:
        """Return file or folder, and row."""
        return f"{self._where}, row {self._part[index]}"


def open_parquet(config: DataConfig, split: str) -> HfDatasetSource:
    """Open one split of parquet files: a folder with splits by file name, or one file with a fraction for validation.

    Raises:
        ConfigError: if there is no file, or one cannot be read.
    """
    assert config.path is not None
    files = _files_by_split(Path(config.path))
    return HfDatasetSource({part: _read_parquet(some) for part, some in files.items()}, config, split)


def open_arrow(config: DataConfig, split: str) -> HfDatasetSource:
    """Open one split of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Raises:
        ConfigError: if the folder is not one.
    """
    import datasets
    import pyarrow  # type: ignore[import-untyped]

    try:
        loaded = datasets.load_from_disk(config.path)
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(
            f"data.path={config.path} cannot be read as a folder written by datasets' save_to_disk: {error}"
        ) from error
    return HfDatasetSource(_by_part(loaded, str(config.path)), config, split)


def open_hub(config: DataConfig, split: str) -> HfDatasetSource:
    """Open one split of a dataset of the Hugging Face hub; downloaded once, then read from the hub's cache.

    Raises:
        ConfigError: if it does not exist, or the hub cannot be reached.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(config.path)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        _refuse_cache(error)
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"data.path={config.path} cannot be loaded from the Hugging Face hub: {first}. data=hub takes an id "
            f"such as ORG/NAME; for files on this machine use data=parquet or arrow"
        ) from error
    return HfDatasetSource(_by_part(loaded, str(config.path)), config, split)


def _by_part(loaded: Any, where: str) -> dict[str, Any]:
    """Return the tables of `train` and `val`, or of `all` if there is one set."""
    if not isinstance(loaded, dict):
        return {"all": loaded}
    if len(loaded) == 1:
        return {"all": next(iter(loaded.values()))}
    names = find_splits(loaded)
    if names is None:
        raise ConfigError(f"{where} needs a split train and one of val, validation, test; it has {', '.join(loaded)}")
    return {half: loaded[name] for half, name in names.items()}


def _files_by_split(path: Path) -> dict[str, list[str]]:
    """Return the files of `train` and `val`, or of `all` if there is one set."""
    if path.is_file():
        return {"all": [str(path)]}
    if not path.is_dir():
        raise ConfigError(f"data.path={path} is neither a folder nor a parquet file")
    every = sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".parquet"))
    parts = parts_by_name(every)
    if parts is not None:
        return parts
    raise ConfigError(
        f"{path} needs parquet files with the word train in their names and others with val or test; it has "
        f"{', '.join(Path(name).name for name in every) or 'none'}. For a single file set data.path=FILE and "
        f"data.val_fraction"
    )


def _read_parquet(files: list[str]) -> Any:
    import datasets
    import pyarrow  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files={"rows": files}, split="rows")
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, OSError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, (pyarrow.ArrowInvalid, OSError)):
            raise
        _refuse_cache(error, reads=files)
        raise ConfigError(f"{', '.join(files)} cannot be read as parquet: {cause}; is every file complete?") from error


def _refuse_cache(error: Exception, *, reads: Sequence[str] = ()) -> None:
    """Raise ConfigError if an error of datasets came from writing its cache, to which it copies all that it reads.

    Args:
        error: error of datasets; its cause names the file.
        reads: files that datasets read.

    Raises:
        ConfigError: if the cache could not be written.
    """
    import datasets

    cause = error.__cause__ or error
    if not isinstance(cause, OSError):
        return
    # datasets checks for free space first, and gives no number.
    is_full = cause.errno in DISK_ERRORS or str(cause).startswith("Not enough disk space")
    place = None if cause.filename is None else os.path.abspath(os.fsdecode(cause.filename))
    if is_full or (place is not None and place not in map(os.path.abspath, reads)):
        cache = str(datasets.config.HF_DATASETS_CACHE)
        raise ConfigError(
            f"the images are copied into a cache once, and {place or cache} cannot be written: "
            f"{cause.strerror or cause}; make room there, or set HF_DATASETS_CACHE, now {cache}, to a folder with "
            f"free space"
        ) from error


def _columns(rows: Any, where: str, *, several: bool) -> tuple[str, str | None]:
    """Return the names of the image column and the label column; None if there is no label column.

    Args:
        rows: a table.
        where: path or id, for the error.
        several: whether a label is a list of integers.
    """
    import datasets

    features = rows.features
    images = [name for name, feature in features.items() if _holds_images(feature)]
    single = {name: getattr(feature, "feature", None) if several else feature for name, feature in features.items()}
    named = [name for name, feature in single.items() if isinstance(feature, datasets.ClassLabel)]
    full = [name for name, feature in single.items() if getattr(feature, "dtype", "").startswith(("int", "uint"))]
    if several and len(named or full) != 1:
        raise ConfigError(
            f"{where} must have one column of lists of integer labels for data.multi_label=true, not "
            f"{named or full} of {', '.join(features)}"
        )
    # A label column that holds text is an error, not a table without labels.
    labels = named or full or [name for name in features if name in ("label", "labels")]
    if len(images) != 1 or len(labels) > 1 or not set(labels) <= {*named, *full}:
        raise ConfigError(
            f"{where} must have one column of images, and one of integer labels or none, not "
            f"{images} and {labels} of {', '.join(features)}"
        )
    return images[0], labels[0] if labels else None


def _labels(rows: Any, label: str, where: str) -> np.ndarray:
    """Return the label column, converted by Arrow: through Python integers it takes 2,000 times as long."""
    column = rows.data.column(label)
    if column.null_count or not len(column):
        raise ConfigError(
            f"{where}: {column.null_count} of {len(column)} rows have no {label}; every image needs one, and at least "
            f"one image is needed"
        )
    return column.to_numpy().astype(np.int64)


def _refuse_other_names(training: Any, validation: Any, where: str) -> None:
    """Raise ConfigError if a label names different classes in the training and the validation rows."""
    trained, other_names = (getattr(getattr(of, "feature", of), "names", None) or [] for of in (training, validation))
    if all(name == other for name, other in zip(trained, other_names, strict=False)):
        return
    raise ConfigError(
        f"{where}: the label column of the rows for validation names other classes than that of the rows for training: "
        f"{describe_change(trained, other_names)}. Give both the same names, in the same order"
    )


def _several_labels(training: Any, rows: Any, label: str, where: str) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return the classes, and all labels of each row; a row with null has none."""
    trained, other_names = ([cell or [] for cell in table.data.column(label).to_pylist()] for table in (training, rows))
    names = getattr(training.features[label].feature, "names", None)
    classes = tuple(names or map(str, range(max((max(cell) for cell in trained if cell), default=-1) + 1)))
    found = {number for cell in other_names for number in cell}
    if not classes or found - set(range(len(classes))):
        raise ConfigError(f"{where}: labels are {sorted(found)[:5]} …, and there are {len(classes)} classes")
    return classes, other_names


def _encoded(rows: Any, image: str) -> Any:
    """Return the rows with encoded images."""
    import datasets

    if not isinstance(rows.features[image], datasets.Image):
        return rows
    return rows.cast_column(image, datasets.Image(decode=False))


def _holds_images(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
