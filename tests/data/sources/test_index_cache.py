"""The cached listing: when it is used, when it is built again, and that its order is the source's own."""

import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from megavit.data.sources import image_folder as folder_module
from megavit.data.sources import webdataset as tars_module
from megavit.data.sources.image_folder import open_folder
from megavit.data.sources.index_cache import Index, load_or_build, settled
from megavit.data.sources.list_files import in_order
from megavit.data.sources.open import open_source, prepare_index
from megavit.errors import ConfigError
from tests.data.sources.tars import labelled, png, shard
from tests.data.sources.test_sources import config, pairs
from tests.distributed import run_ranks

LONG_AGO_NS = 10**18


def age(root: Path, *, later_ns: int = 0) -> None:
    """Give every folder and file an old modification time, one after the other."""
    for number, path in enumerate([root, *sorted(root.rglob("*"))]):
        os.utime(path, ns=(LONG_AGO_NS + later_ns + number,) * 2)


def put(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))


@pytest.fixture
def images(tmp_path):
    """Write nine images of three classes, some in subfolders, one behind a link."""
    root = tmp_path / "images"
    for number in range(9):
        put(root / "abc"[number % 3] / ("." if number % 2 else "deep") / f"{number}.png", number)
    (tmp_path / "far").mkdir()
    put(tmp_path / "far" / "9.png", 9)
    (root / "a" / "linked").symlink_to(tmp_path / "far")
    (root / "a" / "loop").symlink_to(root / "a")
    age(tmp_path)
    return root


@pytest.fixture
def built(monkeypatch):
    """Count how often a listing is built."""
    made = []
    for module, name in ((folder_module, "_list"), (tars_module, "index_shards")):
        full = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, full=full: made.append(given) or full(*given))
    return made


def seen(path: Path, index: Path | None, source: str = "folder") -> list:
    return [
        pairs(open_source(config(path, source, val_fraction=0.3), split, index=index)) for split in ("train", "val")
    ]


@pytest.mark.parametrize("source", ["folder", "images"])
def test_a_listing_is_made_once_and_is_the_same_as_without(source, images, tmp_path, built):
    expected = seen(images, None, source)
    assert len(built) == 2
    assert seen(images, tmp_path / "index", source) == expected
    assert len(built) == 3
    assert seen(images, tmp_path / "index", source) == expected
    assert len(built) == 3


def test_a_listing_of_tars_is_made_once(tmp_path, built):
    for part in ("train", "val"):
        shard(tmp_path / "tars" / part / "0.tar", labelled(range(9)))
    age(tmp_path / "tars")
    tars, index = config(tmp_path / "tars", "tar"), tmp_path / "index"
    for _ in range(2):
        # The validation split opens the training set too: its labels define the classes.
        assert pairs(open_source(tars, "val", index=index)) == pairs(open_source(tars, "train"))
    assert [paths for (paths,) in built].count([f"{tmp_path}/tars/val/0.tar"]) == 1
    shard(tmp_path / "tars" / "val" / "0.tar", labelled(range(8)))
    age(tmp_path / "tars", later_ns=1000)
    assert len(open_source(tars, "val", index=index)) == 8


def remove(root: Path) -> None:
    (root / "b" / "1.png").unlink()


def replace_link(root: Path) -> None:
    (root.parent / "other").mkdir()
    (root / "a" / "linked").unlink()
    (root / "a" / "linked").symlink_to(root.parent / "other")


CHANGES = {
    "an image more": lambda root: put(root / "b" / "20.png", 20),
    "an image less": remove,
    "an image more, deep": lambda root: put(root / "b" / "deep" / "20.png", 20),
    "an image more, behind a link": lambda root: put(root.parent / "far" / "20.png", 20),
    "another link": replace_link,
    "a folder more": lambda root: put(root / "c" / "new" / "20.png", 20),
    "a class more": lambda root: put(root / "d" / "20.png", 20) or put(root / "d" / "21.png", 21),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changed_is_listed_again(change, images, tmp_path, built):
    before = seen(images, tmp_path / "index")
    CHANGES[change](images)
    after = seen(images, tmp_path / "index")
    assert before != after == seen(images, None)
    age(tmp_path / "images")
    assert seen(images, tmp_path / "index") == after


def test_another_path_or_source_is_listed_again(images, tmp_path):
    index = tmp_path / "index"
    seen(images, index)
    assert {label for _, label in seen(images, index, "images")[0]} == {""}
    (tmp_path / "copy").mkdir()
    os.rename(images, tmp_path / "copy" / "images")
    assert len(seen(tmp_path / "copy" / "images" / "a", index, "images")[0]) == 3


def test_what_changed_a_moment_ago_is_not_taken_from_the_listing(images, tmp_path, built):
    put(images / "b" / "20.png", 20)
    seen(images, tmp_path / "index")
    assert len(built) == 2
    assert settled(time.time_ns()) is None
    assert settled(time.time_ns() - 3 * 10**9) is not None


BROKEN = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no listing": lambda content: b"hello\n",
    "a bit": lambda content: content[:-70] + bytes([content[-70] ^ 1]) + content[-69:],
    "a bit of the header": lambda content: content[:30] + bytes([content[30] ^ 1]) + content[31:],
    "of another form": None,
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_listing_is_built_again(damage, images, tmp_path, built, monkeypatch):
    from megavit.data.sources import index_cache as index_module

    expected, file = seen(images, tmp_path / "index"), tmp_path / "index" / "all.index"
    if BROKEN[damage] is None:
        monkeypatch.setattr(index_module, "_FORMAT", 2)
    else:
        file.write_bytes(BROKEN[damage](file.read_bytes()))
    assert seen(images, tmp_path / "index") == expected
    assert len(built) == 2
    assert os.listdir(tmp_path / "index") == ["all.index"]


def test_a_listing_that_cannot_be_written_is_an_error(images, tmp_path):
    (tmp_path / "index").write_text("in the way")
    with pytest.raises(ConfigError, match=r"index/all\.index cannot be written: .*; it caches the list of the images"):
        seen(images, tmp_path / "index")


def test_a_full_disk_leaves_no_partial_listing(images, small_disk):
    disk = small_disk("40k")
    (disk / "filler").write_bytes(bytes(38_000))
    with pytest.raises(ConfigError, match="No space left on device; it caches the list of the images"):
        seen(images, disk / "index")
    assert list((disk / "index").iterdir()) == []


def test_columns_are_mapped_from_the_file_and_equal_those_written(tmp_path):
    made = Index(
        {"odd": "\udcff", "list": [1, None]},
        {
            "names": np.array([b"a", "é".encode(), b"\xff\xfe"]),
            "numbers": np.arange(3, dtype=np.int64),
            "none": np.zeros(0, dtype=np.int32),
        },
    )
    kept = load_or_build(tmp_path, "x", fits=lambda about: True, build=lambda: made)
    assert kept.about == made.about
    for name, column in made.arrays.items():
        assert kept.arrays[name].dtype == column.dtype
        assert kept.arrays[name].tolist() == column.tolist()
    assert not kept.arrays["numbers"].flags.writeable
    assert load_or_build(tmp_path, "x", fits=lambda about: about == made.about, build=None).about == made.about


def test_names_that_are_no_text_survive_the_listing(tmp_path):
    names = ["naïve, 東京.png", "\udcff\udcfe.png", "line\nbreak.png", "a b.PNG"]
    for number, name in enumerate(names):
        put(tmp_path / "images" / "a" / name, number)
    age(tmp_path / "images")
    for _ in range(2):
        files = open_folder(config(tmp_path / "images", "folder", val_fraction=0.3), "train", tmp_path / "index")
        other = open_folder(config(tmp_path / "images", "folder", val_fraction=0.3), "val", tmp_path / "index")
        found = {
            part.name(i).rpartition("/")[2]: int(part.image(i)[0, 0, 0])
            for part in (files, other)
            for i in range(len(part))
        }
        assert found == {name.replace("\udcff\udcfe", r"\xff\xfe"): number for number, name in enumerate(names)}
        for name in found:
            name.encode()


def test_the_order_compares_texts_and_numbers():
    def by_parts(path: str) -> tuple:
        parts = re.split(r"(\d+)", path.rpartition("/")[2])
        return [int(part) if part.isdecimal() else part for part in parts], path

    draw = random.Random(0)
    for _ in range(500):
        names = ["".join(draw.choices("ab10./_٣é😀 ", k=draw.randrange(1, 8))) for _ in range(12)]
        assert in_order(names) == sorted(names, key=by_parts)


def open_as_a_rank(path: str, index: str) -> tuple[list, bool]:
    import torch.distributed as dist

    from megavit.data.sources import image_folder as folder
    from megavit.parallel.collectives import wait_for_rank_zero

    dist.init_process_group("gloo")
    data, builds, full = config(Path(path), "folder", val_fraction=0.3), [], folder._list
    folder._list = lambda *given: builds.append(1) or full(*given)
    try:
        wait_for_rank_zero(lambda: prepare_index(data, Path(index)))
        source = open_source(data, "train", index=Path(index))
    finally:
        folder._list = full
    return pairs(source), bool(builds)


def test_of_several_ranks_one_makes_the_listing(images, tmp_path):
    answers = run_ranks(open_as_a_rank, 2, str(images), str(tmp_path / "index"))
    assert answers[0][0] == answers[1][0] == seen(images, None)[0]
    assert [builds for _, builds in answers] == [True, False]
