"""Read images from a local or remote CSV file with the path and label of one image per line."""

import csv
import io
import os
from pathlib import Path

import numpy as np

from megavit.data.config import DataConfig
from megavit.data.sources import remote
from megavit.data.sources.image_files import ImageFileSource, as_bytes
from megavit.data.sources.train_val_split import split_indices
from megavit.errors import ConfigError

_COLUMNS = ("path", "label")


def open_csv(config: DataConfig, split: str) -> ImageFileSource:
    """Open one split of a list: PATH/train.csv and PATH/val.csv, or the file PATH with a fraction for validation.

    The first line names the columns. `path` is relative to the CSV's folder, or a URL. `label` is a class name; with
    `data.multi_label` it is several names joined by |, or empty. Blanks around a name are removed.
    Classes are sorted by name, or as numbers if all are numbers. PATH may be a URL.

    Args:
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if a file, a column or a label is missing.
    """
    assert config.path is not None
    path = config.path
    is_folder = not remote.bare(path).endswith(".csv") if remote.is_url(path) else os.path.isdir(path)
    halves = {half: f"{path.rstrip('/')}/{half}.csv" for half in ("train", "val")} if is_folder else {}
    if halves and config.val_fraction is not None:
        raise ConfigError(
            f"data.val_fraction={config.val_fraction} would be ignored: {path} has train.csv and val.csv; leave it null"
        )
    several = config.multi_label
    training = _read(halves.get("train", path), several=several)
    classes = tuple(sorted({label for _, labels in training for label in labels}, key=_by_number_or_name))
    rows = training if split == "train" or not halves else _read(halves["val"], several=several)
    places = {name: place for place, name in enumerate(classes)}
    unknown = sorted({label for _, labels in rows for label in labels} - set(classes))
    if unknown:
        raise ConfigError(f"{halves['val']} has labels that {halves['train']} lacks: {', '.join(unknown[:5])}")
    if not classes:
        raise ConfigError(f"{path} has no label in any line; without labels images are data=images")
    label_sets = [[places[label] for label in labels] for _, labels in rows]
    # With several labels per image a fraction of each class is not defined: treat all images as one class.
    labels = np.zeros(len(rows), dtype=int) if several else np.array([label for (label,) in label_sets])
    return ImageFileSource(
        as_bytes([name for name, _ in rows]),
        labels,
        classes=classes,
        channels=config.channels,
        part=None if halves else split_indices(labels, config.val_fraction, split, where=path),
        label_sets=label_sets if several else None,
    )


def _read(path: str, *, several: bool) -> list[tuple[str, list[str]]]:
    """Return the path and labels of each line."""
    folder = remote.bare(path).rpartition("/")[0] if remote.is_url(path) else os.path.dirname(path)
    try:
        content = remote.read(path) if remote.is_url(path) else Path(path).read_bytes()
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        # Blanks after commas are common.
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        if not set(_COLUMNS) <= set(columns):
            raise ConfigError(
                f"{path} must name the columns path and label in its first line, not {', '.join(columns) or 'none'}"
            )
        rows = [(row["path"] or "", (row["label"] or "").strip()) for row in reader]
    except OSError as error:
        raise ConfigError(
            f"data.path={path} cannot be read: {error.strerror}; data=csv takes a CSV file, or a folder with "
            f"train.csv and val.csv"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if not rows:
        raise ConfigError(f"{path} lists no image; list one per line below the first")
    # The first line names the columns.
    for line, (name, label) in enumerate(rows, start=2):
        if not name or not (label or several):
            raise ConfigError(f"{path}, line {line}: path or label is empty; every image needs both")
        if name.startswith("/") and remote.is_url(path):
            raise ConfigError(
                f"{path}, line {line}: {name} is a path on one machine; in a remote list use URLs, or paths relative "
                f"to it"
            )
    named = [
        (
            name if remote.is_url(name) else os.path.join(folder, name),
            list(dict.fromkeys(filter(None, map(str.strip, label.split("|"))))) if several else [label],
        )
        for name, label in rows
    ]
    first = named[0][0]
    if not (remote.exists(first) if remote.is_url(first) else os.path.isfile(first)):
        raise ConfigError(f"{path}, line 2: {first} does not exist; paths are relative to the CSV's folder")
    return named


def _by_number_or_name(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)
