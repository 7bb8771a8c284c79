"""Sources of a user's images: a CSV, images without labels, arrays of any number of channels, tables."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.config.compose import compose
from megavit.data.config import DataConfig
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from tests.distributed import run_ranks
from tests.reference import SMALL


@cache
def folder_group() -> DataConfig:
    return compose(["data=folder", "recipe=null"]).data


def config(path: Path | str, source: str, **changes) -> DataConfig:
    made = replace(folder_group(), path=str(path), source=source, **changes)
    made.check()
    return made


def draw(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)
    return path


def pairs(of) -> list[tuple[int, str]]:
    """Return the first pixel, which is the image's number, and the class of each image."""
    return [(int(of.image(i)[0, 0, 0]), of.classes[of.label(i)] if of.classes else "") for i in range(len(of))]


@pytest.fixture
def listed(tmp_path):
    """Write twelve images in one folder, and a list of them by number."""
    for number in range(12):
        draw(tmp_path / "images" / f"{number}.png", number)
    lines = [f"images/{number}.png,{number % 3 * 5}" for number in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    return tmp_path


def test_a_list_names_images_and_classes_sorted_as_numbers(listed):
    parts = [open_source(config(listed / "all.csv", "csv", val_fraction=0.25), split) for split in ("train", "val")]
    assert parts[0].classes == parts[1].classes == ("0", "5", "10")
    assert [len(part) for part in parts] == [9, 3]
    assert sorted(pairs(parts[0]) + pairs(parts[1])) == [(number, str(number % 3 * 5)) for number in range(12)]


def test_two_lists_are_the_two_parts_in_their_own_order(listed):
    (listed / "train.csv").write_text("label,extra,path\nbee,x,images/7.png\nant,y,images/2.png\n")
    (listed / "val.csv").write_text("path,label\nimages/3.png,bee\n")
    assert pairs(open_source(config(listed, "csv"), "train")) == [(7, "bee"), (2, "ant")]
    assert pairs(open_source(config(listed, "csv"), "val")) == [(3, "bee")]


def test_blanks_around_labels_and_columns_are_removed(listed):
    (listed / "all.csv").write_text("path, label\nimages/1.png, ant\nimages/2.png,ant \nimages/3.png,\tbee\u00a0\n")
    train = open_source(config(listed / "all.csv", "csv", val_fraction=0), "train")
    assert pairs(train) == [(1, "ant"), (2, "ant"), (3, "bee")]
    (listed / "all.csv").write_text("path,label\nimages/1.png,ant | bee\nimages/2.png, bee|\nimages/3.png,  \n")
    train = open_source(config(listed / "all.csv", "csv", val_fraction=0, multi_label=True), "train")
    assert train.classes == ("ant", "bee")
    assert [train.labels(index) for index in range(3)] == [[0, 1], [1], []]
    assert train.label_counts().tolist() == [1, 2]


WRONG_LISTS = {
    "no such file": (None, "No such file or directory; data=csv takes a CSV file"),
    "other columns": (
        "file,class\na.png,x\n",
        "must name the columns path and label in its first line, not file, clas",
    ),
    "nothing below": ("path,label\n", "lists no image"),
    "a label is missing": ("path,label\nimages/1.png,a\nimages/2.png,\n", "line 3: path or label is empty"),
    "a path is missing": ("path,label\n,a\n", "line 2: path or label is empty"),
    "paths of another folder": ("path,label\n1.png,a\n", "line 2: .*1.png does not exist; paths are relative"),
    "no text": (b"\xff\xfe\x00", "cannot be read as CSV in UTF-8"),
    "half a line": ("path,label\nimages/1.png\n", "line 2: path or label is empty"),
}


@pytest.mark.parametrize("mistake", WRONG_LISTS)
def test_a_list_that_cannot_be_used_is_refused_by_line(mistake, listed):
    content, message = WRONG_LISTS[mistake]
    if content is not None:
        (listed / "wrong.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        open_source(config(listed / "wrong.csv", "csv", val_fraction=0.5), "train")


def test_labels_of_validation_alone_are_refused(listed):
    (listed / "train.csv").write_text("path,label\nimages/1.png,a\n")
    (listed / "val.csv").write_text("path,label\nimages/2.png,b\n")
    with pytest.raises(ConfigError, match=r"val\.csv has labels that .*train\.csv lacks: b"):
        open_source(config(listed, "csv"), "val")
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.5 would be ignored"):
        open_source(config(listed, "csv", val_fraction=0.5), "train")


def test_images_without_labels_are_split_and_subset(tmp_path):
    for number in range(20):
        draw(tmp_path / ("a" if number % 2 else "b/c") / f"{number}.png", number)
    parts = [open_source(config(tmp_path, "images", val_fraction=0.2), split) for split in ("train", "val")]
    assert parts[0].classes == ()
    assert [len(part) for part in parts] == [16, 4]
    assert sorted(pairs(parts[0]) + pairs(parts[1])) == [(number, "") for number in range(20)]
    half = open_source(config(tmp_path, "images", val_fraction=0.2, fraction=0.5), "train")
    assert len(half) == 8
    assert set(pairs(half)) < set(pairs(parts[0]))
    with pytest.raises(ConfigError, match=r"data\.classes: ant is no class .*; it has no classes"):
        open_source(config(tmp_path, "images", val_fraction=0.2, classes=["ant"]), "train")


def test_files_numbered_by_row_come_in_the_rows_order_whatever_their_folder(tmp_path):
    for number in range(12):
        draw(tmp_path / "all" / ("bee" if number % 5 else "ant") / f"img_{number}.png", number)
    (tmp_path / "all").rename(tmp_path / "train")
    draw(tmp_path / "val" / "ant" / "0.png")
    draw(tmp_path / "val" / "bee" / "1.png")
    assert [number for number, _ in pairs(open_source(config(tmp_path, "folder"), "train"))] == list(range(12))
    assert [number for number, _ in pairs(open_source(config(tmp_path, "images"), "train"))] == list(range(12))


@pytest.mark.parametrize("deep", [False, True], ids=["uint8", "uint16"])
def test_arrays_of_any_number_of_channels_are_images(deep, tmp_path):
    values = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    for name in ("ant/0", "ant/1", "bee/2", "bee/3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, values.astype(np.uint16) * 256 + 17 if deep else values)
    five = dict(channels=5, mean=[0.5] * 5, std=[0.2] * 5, val_fraction=0.5)
    source = open_source(config(tmp_path, "folder", **five), "train")
    assert torch.equal(source.image(0), torch.from_numpy(values).permute(2, 0, 1))
    with pytest.raises(ConfigError, match=r"\d\.npy has 5 channels, and data\.channels=3"):
        open_source(config(tmp_path, "folder", val_fraction=0.5), "train").image(0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), "an array of float32"),
        (np.zeros((0, 3, 1), dtype=np.uint8), "an array of uint8"),
        (np.array([{}]), "allow_pickle=False"),
        (np.zeros((2, 2, 2, 2), dtype=np.uint8), "has the shape"),
    ],
    ids=["floats", "empty", "objects", "four axes"],
)
def test_arrays_that_are_no_images_are_refused_by_name(array, message, tmp_path):
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", array, allow_pickle=True)
    with pytest.raises(ConfigError, match=rf"\d\.npy .*{message}"):
        open_source(config(tmp_path, "images", val_fraction=0.5, channels=1, mean=[0.5], std=[0.5]), "train").image(0)


def test_pictures_keep_channels_that_are_neither_grey_nor_colour(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(2):
        Image.new("RGBA", (6, 4), (1, 2, 3, number)).save(tmp_path / "a" / f"{number}.png")
    four = dict(channels=4, mean=[0.5] * 4, std=[0.5] * 4, val_fraction=0.5)
    parts = [open_source(config(tmp_path, "images", **four), split) for split in ("train", "val")]
    assert sorted(part.image(0)[:, 0, 0].tolist() for part in parts) == [[1, 2, 3, 0], [1, 2, 3, 1]]


def tables(count: int):
    import datasets

    images = [Image.new("RGB", (6, 4), (number, 0, 0)) for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    return datasets.Dataset.from_dict(
        {"image": images, "label": [number % 2 for number in range(count)]}, features=features
    )


def test_a_folder_written_by_save_to_disk_is_read(tmp_path, monkeypatch):
    import datasets

    tables(8).save_to_disk(tmp_path / "one")
    parts = [open_source(config(tmp_path / "one", "arrow", val_fraction=0.25), split) for split in ("train", "val")]
    assert sorted(pairs(parts[0]) + pairs(parts[1])) == [(n, "bee" if n % 2 else "ant") for n in range(8)]
    datasets.DatasetDict({"train": tables(4), "test": tables(2)}).save_to_disk(tmp_path / "two")
    assert len(open_source(config(tmp_path / "two", "arrow"), "val")) == 2
    with pytest.raises(ConfigError, match="cannot be read as a folder written by datasets' save_to_disk"):
        open_source(config(tmp_path / "nowhere", "arrow", val_fraction=0.5), "train")
    datasets.DatasetDict({"train": tables(4), "extra": tables(2)}).save_to_disk(tmp_path / "three")
    with pytest.raises(ConfigError, match="needs a split train and one of val, validation, test; it has train, extra"):
        open_source(config(tmp_path / "three", "arrow"), "train")


def test_a_dataset_of_the_hub_is_loaded_by_its_id(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"train": tables(4), "validation": tables(2)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert pairs(open_source(config(Path("someone/insects"), "hub"), "val")) == [(0, "ant"), (1, "bee")]
    assert asked == ["someone/insects"]


def test_a_missing_dataset_and_an_unreachable_hub_are_errors_of_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"data\.path=no-such/thing cannot be loaded from the Hugging Face hub: "):
        open_source(config(Path("no-such/thing"), "hub"), "train")


def test_tables_without_labels_serve_what_needs_none(tmp_path):
    tables(4).remove_columns("label").save_to_disk(tmp_path / "one")
    source = open_source(config(tmp_path / "one", "arrow", val_fraction=0.5), "train")
    assert source.classes == ()
    assert len(source) == 2


def train_unlabelled(overrides: list[str]) -> dict:
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    trainer = Trainer(compose(overrides))
    code = trainer.run()
    return {"code": code, **trainer.last_validation}


def test_a_masked_autoencoder_trains_on_images_without_labels_and_a_classifier_says_what_it_misses(tmp_path):
    from tests.test_mae_parity import MAE

    for number in range(24):
        draw(tmp_path / "images" / f"{number}.png", number * 10)
    unlabelled = [
        "recipe=digits", "data.source=images",
        f"data.path={tmp_path / 'images'}", "data.val_fraction=0.25", "train.steps=3",
    ]  # fmt: skip
    result = run_ranks(train_unlabelled, 1, [*SMALL, *MAE, *unlabelled, f"run.dir={tmp_path / 'run'}"])[0]
    assert result["code"] == 0
    assert result["count"] == 6
    with pytest.raises(AssertionError, match=r"task\.name=classify needs labels, and data\.source=images has none"):
        run_ranks(train_unlabelled, 1, [*SMALL, *unlabelled, f"run.dir={tmp_path / 'other'}"])
