"""Parquet files: the rows that are read, files that are refused, and reading in a worker process."""

import io
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from megavit.config.compose import compose
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError


def encoded(value: int) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(labels: list, images: list | None = None, *, label_type=None) -> pa.Table:
    images = [encoded(value) for value in range(len(labels))] if images is None else images
    return pa.table({"image": images, "label": pa.array(labels, label_type)})


def write(path: Path, rows: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path)
    return path


def parquet_config(path: Path, **changes):
    return replace(compose(["data=cifar10", "recipe=null", f"data.path='{path}'"]).data, **changes)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_names_determine_the_splits_and_labels_the_classes(tmp_path):
    write(tmp_path / "a-train-0.parquet", table([0, 2]))
    write(tmp_path / "a-train-1.parquet", table([1]))
    write(tmp_path / "a-test.parquet", table([0] * 5))
    write(tmp_path / "a-validation.parquet", table([2, 1]))
    train, val = (open_source(parquet_config(tmp_path), split) for split in ("train", "val"))
    assert [train.label(i) for i in range(len(train))] == [0, 2, 1]
    assert [val.label(i) for i in range(len(val))] == [2, 1]  # the validation file, not the test's
    assert train.classes == val.classes == ("0", "1", "2")
    assert [int(train.image(i)[0, 0, 0]) for i in range(3)] == [0, 1, 0]
    assert train.image(0).shape == (3, 4, 6)


@pytest.mark.parametrize("label_type", [pa.int64(), pa.uint8()])
def test_one_file_is_divided_into_disjoint_parts_that_cover_it(label_type, tmp_path):
    path = write(tmp_path / "all.parquet", table([0] * 6 + [1] * 4, label_type=label_type))
    parts = [open_source(parquet_config(path, val_fraction=0.5), split) for split in ("train", "val")]
    seen = [[(int(part.image(i)[0, 0, 0]), part.label(i)) for i in range(len(part))] for part in parts]
    assert [len(part) for part in seen] == [5, 5]
    # A pixel's value is the row's number: the rows of both splits are all rows, each with its own label.
    assert sorted(seen[0] + seen[1]) == [(row, int(row >= 6)) for row in range(10)]


def test_a_worker_process_reads_the_same_images(tmp_path):
    source = open_source(parquet_config(write(tmp_path / "all.parquet", table([0] * 8)), val_fraction=0.5), "train")
    sent = pickle.loads(pickle.dumps(source))
    assert all(torch.equal(source.image(i), sent.image(i)) for i in range(4))


DAMAGED = {
    "no parquet": (lambda path: path.write_bytes(b"hello") and path, "cannot be read as parquet"),
    "no rows": (lambda path: write(path, table([0]).slice(0, 0)), "rows.parquet"),
    "half the file": (
        lambda path: path.write_bytes(write(path, table([0] * 50)).read_bytes()[:-200]) and path,
        "cannot be read as parquet",
    ),
    "a label is missing": (lambda path: write(path, table([0, None, 1, 1])), "1 of 4 rows have no label"),
    "a label is negative": (lambda path: write(path, table([0, -1])), "labels go from -1 to 0"),
    "labels are words": (lambda path: write(path, table(["a", "b"])), "and one of integer labels"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_cannot_be_used_is_refused_by_name(damage, tmp_path):
    make, message = DAMAGED[damage]
    config = parquet_config(make(tmp_path / "rows.parquet"), val_fraction=0.5)
    with pytest.raises(ConfigError, match=message) as refused:
        open_source(config, "train")
    assert "rows.parquet" in str(refused.value)


def test_validation_files_of_other_columns_are_refused(tmp_path):
    write(tmp_path / "a-train.parquet", table([0, 1]))
    write(tmp_path / "a-val.parquet", table([0, 1]).rename_columns(["image", "fine"]))
    with pytest.raises(ConfigError, match="must have the columns image and label too, not image, fine"):
        open_source(parquet_config(tmp_path), "val")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "row 1 has no image"),
        ({"bytes": None, "path": None}, "row 1 has no image"),
        ({"bytes": b"no picture", "path": None}, "row 1 cannot be read as an image"),
        ({"bytes": None, "path": "/nowhere/x.png"}, "row 1, /nowhere/x.png cannot be read"),
    ],
)
def test_a_row_without_a_readable_image_is_refused_by_number(cell, message, tmp_path):
    write(tmp_path / "a-train.parquet", table([0, 0], [encoded(0), cell]))
    write(tmp_path / "a-val.parquet", table([0]))
    source = open_source(parquet_config(tmp_path), "train")
    assert source.image(0).shape == (3, 4, 6)
    with pytest.raises(ConfigError, match=message):
        source.image(1)


@pytest.mark.parametrize("place", ["missing", "read-only", "full"])
def test_a_cache_that_cannot_be_written_is_reported_as_such(place, tmp_path, small_disk, monkeypatch):
    import datasets

    cache = Path("/proc/nowhere")
    if place != "missing":
        cache = small_disk("64k")
    if place == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = table([0, 1], [{"bytes": bytes(100_000), "path": None}] * 2)
    config = parquet_config(write(tmp_path / "all.parquet", rows), val_fraction=0.5)
    with pytest.raises(ConfigError, match=rf"copied into a cache once, and {cache}.* cannot be written: ") as refused:
        open_source(config, "train")
    assert f"set HF_DATASETS_CACHE, now {cache}, to a folder with free space" in str(refused.value)


def test_a_file_that_cannot_be_read_is_not_reported_as_the_cache(tmp_path):
    (tmp_path / "all.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(ConfigError, match=r"all\.parquet cannot be read as parquet: .*is every file complete"):
        open_source(parquet_config(tmp_path / "all.parquet", val_fraction=0.5), "train")


def test_label_numbers_with_holes_are_counted(tmp_path):
    source = open_source(parquet_config(write(tmp_path / "x.parquet", table([1, 1, 3, 3])), val_fraction=0), "train")
    assert source.label_counts().tolist() == [0, 2, 0, 2]
