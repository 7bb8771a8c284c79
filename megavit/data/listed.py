"""Images named in a CSV file, a line each with path and label."""

import csv
from pathlib import Path

from megavit.data.config import DataConfig
from megavit.data.files import ImageFiles
from megavit.data.split import split_indices
from megavit.errors import ConfigError

_COLUMNS = ("path", "label")


def open_listed(config: DataConfig, split: str) -> ImageFiles:
    """One split of a list: PATH/train.csv and PATH/val.csv, or the file PATH with a share to validate on.

    The first line names the columns; `path` is relative to the CSV's folder, `label` is a class's name. Classes are
    sorted by name, or as numbers where all of them are.

    Args:
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: if a file, a column or a label is missing.
    """
    assert config.path is not None
    path = Path(config.path)
    halves = {half: path / f"{half}.csv" for half in ("train", "val")} if path.is_dir() else {}
    if halves and config.val_fraction is not None:
        raise ConfigError(
            f"data.val_fraction={config.val_fraction} would be ignored: {path} has train.csv and val.csv; leave it null"
        )
    training = _read(halves.get("train", path))
    classes = tuple(sorted({label for _, label in training}, key=_by_number_or_name))
    rows = training if split == "train" or not halves else _read(halves["val"])
    places = {name: place for place, name in enumerate(classes)}
    unknown = sorted({label for _, label in rows} - set(classes))
    if unknown:
        raise ConfigError(f"{halves['val']} has labels that {halves['train']} has not: {', '.join(unknown[:5])}")
    files = ImageFiles(
        [name for name, _ in rows],
        [places[label] for _, label in rows],
        classes=classes,
        channels=config.channels,
    )
    if halves:
        return files
    return files.part(split_indices(files.labels, config.val_fraction, split, where=str(path)))


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not set(_COLUMNS) <= set(columns):
                raise ConfigError(
                    f"{path} must name the columns path and label in its first line, not {', '.join(columns) or 'none'}"
                )
            rows = [(str(path.parent / (row["path"] or "")), row["label"] or "") for row in reader]
    except OSError as error:
        raise ConfigError(
            f"data.path={path} cannot be read: {error.strerror}; data=csv takes a CSV file, or a folder with "
            f"train.csv and val.csv"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if not rows:
        raise ConfigError(f"{path} lists no image; each takes a line below the first")
    # The first line names the columns.
    for line, (name, label) in enumerate(rows, start=2):
        if not label or name == str(path.parent):
            raise ConfigError(f"{path}, line {line}: path or label is empty; every image needs both")
    if not Path(rows[0][0]).is_file():
        raise ConfigError(f"{path}, line 2: {rows[0][0]} is not there; paths are relative to the CSV's folder")
    return rows


def _by_number_or_name(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)
