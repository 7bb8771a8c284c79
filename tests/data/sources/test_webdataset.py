"""Tar shards: the samples and their order, shards that are refused, and reading in another process."""

import io
import multiprocessing as mp
import os
import pickle
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavit.data.sources.open import open_source
from megavit.data.sources.tar_index import read_headers
from megavit.errors import ConfigError
from tests.data.sources.tars import labelled, png, shard
from tests.data.sources.test_sources import config as source_config
from tests.data.sources.test_sources import pairs


def tar_config(path: Path | str, **changes):
    return source_config(path, "tar", **changes)


def both(path: Path | str, **changes) -> list:
    return [open_source(tar_config(path, **changes), split) for split in ("train", "val")]


@pytest.mark.parametrize("by", ["cls", "json"])
def test_shards_in_two_folders_are_the_two_parts(by, tmp_path):
    shard(tmp_path / "train" / "s-0.tar", labelled(range(6), by=by))
    shard(tmp_path / "train" / "s-1.tar", labelled(range(6, 9), by=by))
    shard(tmp_path / "val" / "s-0.tar", labelled([20], by=by))
    train, val = both(tmp_path)
    assert pairs(train) == [(number, str(number % 3)) for number in range(9)]
    assert pairs(val) == [(20, "2")]
    assert train.classes == val.classes == ("0", "1", "2")
    assert train.name(7) == f"{tmp_path}/train/s-1.tar, 000007.png"
    assert train.image_shape is None


def test_two_folders_by_other_words_are_the_two_parts(tmp_path):
    shard(tmp_path / "Training" / "s.tar", labelled(range(6)))
    shard(tmp_path / "valid" / "s.tar", labelled([20]))
    train, val = both(tmp_path)
    assert (len(train), pairs(val)) == (6, [(20, "2")])
    assert val.label_counts().tolist() == [0, 0, 1]


def test_names_determine_the_splits_and_a_file_the_classes(tmp_path):
    shard(tmp_path / "a-train-0.tar", labelled(range(3)))
    shard(tmp_path / "a-train-1.tar", labelled(range(3, 6)))
    shard(tmp_path / "a-test.tar", labelled([30]))
    shard(tmp_path / "a-validation.tar", labelled([7, 8]))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    train, val = both(tmp_path)
    assert pairs(train) == list(zip(range(6), ["ant", "bee", "cat"] * 2, strict=True))
    assert pairs(val) == [(7, "bee"), (8, "cat")]


def test_one_set_is_divided_as_the_same_images_in_a_folder_are(tmp_path):
    shard(tmp_path / "tars" / "b.tar", labelled(range(20, 40)))
    shard(tmp_path / "tars" / "a.tar", labelled(range(20)))
    for number in range(40):
        path = tmp_path / "folder" / str(number % 3) / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    for split in ("train", "val"):
        tars = open_source(tar_config(tmp_path / "tars", val_fraction=0.2), split)
        folder = open_source(source_config(tmp_path / "folder", "folder", val_fraction=0.2), split)
        assert pairs(tars) == pairs(folder)


def test_one_file_and_a_list_of_files_are_read(tmp_path):
    path = shard(tmp_path / "deep" / "all.tar", labelled(range(9)))
    parts = both(path, val_fraction=0.34)
    assert sorted(pairs(parts[0]) + pairs(parts[1])) == [(number, str(number % 3)) for number in range(9)]
    (tmp_path / "shards.txt").write_text(f"deep/all.tar\n\n{shard(tmp_path / 'more.tar', labelled([9]))}\n")
    assert sum(len(part) for part in both(tmp_path / "shards.txt", val_fraction=0.3)) == 10


def test_samples_come_by_the_numbers_in_their_names_whatever_their_shard_and_folder(tmp_path):
    shard(tmp_path / "train" / "0.tar", {f"b/img_{number}.png": png(number) for number in (11, 2, 0)})
    shard(tmp_path / "train" / "1.tar", {f"a/img_{number}.png": png(number) for number in (10, 1)})
    shard(tmp_path / "val" / "0.tar", {"./x.png": png(1)})
    train, val = both(tmp_path)
    assert [number for number, _ in pairs(train)] == [0, 1, 2, 10, 11]
    assert train.classes == ()
    assert val.name(0).endswith("0.tar, x.png")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_are_long_or_of_any_letters_are_complete(form, tmp_path):
    names = ["naïve photo, 東京.png", "b" * 90 + ".png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["d/" * 80 + "c" * 150 + ".png", "\udcff odd.png"]
    members = {name: png(number) for number, name in enumerate(names)}
    path = shard(tmp_path / "x.tar", members, format=form, errors="surrogateescape", encoding="utf-8")
    with path.open("rb") as file:
        assert {placed.name for placed in read_headers(file, "x.tar")} == set(names)
    parts = both(path, val_fraction=0.5)
    seen = {part.name(i).partition(", ")[2]: int(part.image(i)[0, 0, 0]) for part in parts for i in range(len(part))}
    assert seen == {
        name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"): number
        for number, name in enumerate(names)
    }


def test_members_that_belong_to_no_sample_are_skipped(tmp_path):
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    extra = {
        "d": folder,
        "README": b"x",
        "notes.txt": b"x",
        ".hidden.png": b"x",
        ".thumbnails/000001.png": b"x",
        "000001.txt": b"a caption",
        "000001.seg.png": b"a mask",
        "d/000002.PNG": png(2),
        "d/000002.cls": b" 2\n",
        "d/000002.json": b'{"label": 2, "more": []}',
    }
    path = shard(tmp_path / "x.tar", labelled([0, 1]) | extra)
    with path.open("rb") as file:
        assert [(placed.name, placed.label) for placed in read_headers(file, "x")] == [
            ("000000.png", 0),
            ("000001.png", 1),
            ("d/000002.PNG", 2),
        ]


def special(name: str, kind: bytes) -> dict:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "000000.png"
    return {name: member}


def truncate(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def spoil(path: Path, at: int) -> Path:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    return path


def joined(path: Path) -> Path:
    path.write_bytes(path.read_bytes() * 2)
    return path


UNSAFE = {
    "a path upwards": {"../up.png": png(0)},
    "a path upwards within": {"a/../../up.png": png(0)},
    "an absolute path": {"/etc/up.png": png(0)},
    "a link": special("up.png", tarfile.SYMTYPE),
    "a hard link": special("up.png", tarfile.LNKTYPE),
    "a device": special("up.png", tarfile.CHRTYPE),
    "a block device": special("up.png", tarfile.BLKTYPE),
    "a pipe": special("up.png", tarfile.FIFOTYPE),
    "of type b'V'": special("up.png", b"V"),
    "a link that is no image": special("up.txt", tarfile.SYMTYPE),
    "a folder upwards": special("../up", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_a_member_that_is_no_file_within_the_tar_is_refused_by_name(what, tmp_path):
    path = shard(tmp_path / "x.tar", labelled(range(4)) | UNSAFE[what])
    message = {"a hard link": "is a link", "a block device": "is a device"}.get(what, "is outside the tar|is (a|of) ")
    with pytest.raises(ConfigError, match=rf"x\.tar: the member .*up\S* ({message})"):
        open_source(tar_config(path, val_fraction=0.5), "train")


WRONG = {
    "two images": (
        labelled([0]) | {"000000.jpg": png(1)},
        "the sample 000000 has two images, 000000.png and 000000.jpg",
    ),
    "no image": ({"a.cls": b"1"}, r"the sample a has no image, but \.cls"),
    "a name with dots": ({"photo.v2.jpg": png(1)}, r"the sample photo has no image, but \.v2\.jpg"),
    "a word": ({"a.png": png(0), "a.cls": b"cat"}, r"x\.tar: a\.cls has the label cat; labels are integers"),
    "a negative label": ({"a.png": png(0), "a.cls": b"-1"}, "has the label -1"),
    "a label beyond reason": ({"a.png": png(0), "a.cls": b"1000000"}, "has the label 1000000"),
    "no label in a .cls": ({"a.png": png(0), "a.cls": b""}, "has the label ;"),
    "a fraction": ({"a.png": png(0), "a.json": b'{"label": 1.5}'}, "has the label 1.5"),
    "a truth": ({"a.png": png(0), "a.json": b'{"label": true}'}, "has the label True"),
    "no JSON": ({"a.png": png(0), "a.json": b"{"}, r"a\.json cannot be read as JSON"),
    "deep JSON": ({"a.png": png(0), "a.json": b"[" * 100_000}, r"a\.json cannot be read as JSON"),
    "two labels": ({"a.png": png(0), "a.cls": b"1", "a.json": b'{"label": 2}'}, "the sample a has two labels, 1 and 2"),
    "some labels": (labelled([0]) | {"b.png": png(1)}, r"b\.png has no label, and .*000000\.png has one"),
    "nothing": ({}, "no image in 1 shards"),
}


@pytest.mark.parametrize("what", WRONG)
def test_samples_that_cannot_be_used_are_refused_by_name(what, tmp_path):
    members, message = WRONG[what]
    path = shard(tmp_path / "x.tar", members)
    with pytest.raises(ConfigError, match=message) as refused:
        open_source(tar_config(path, val_fraction=0.5), "train")
    assert str(path) in str(refused.value)


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a/000000.png"))
    with pytest.raises(ConfigError, match=r"x\.tar: a/000000\.png exists twice"):
        open_source(tar_config(path, val_fraction=0.5), "train")


# Each sample takes four blocks of 512 bytes: two headers, an image of fewer than 512, a label.
DAMAGED = {
    "within an image": (lambda path: truncate(path, 512 + 20), "ends within 000000.png"),
    "within a header": (lambda path: truncate(path, 4 * 512 + 100), "without tar's end marker"),
    "between two members": (lambda path: truncate(path, 8 * 512), "without tar's end marker"),
    "a byte of a header": (lambda path: spoil(path, 4 * 512 + 3), "has an unreadable header at byte 2,048"),
    "the first header": (lambda path: spoil(path, 3), "cannot be read as a tar"),
    "two tars in one": (joined, "before its end"),
    "no tar": (lambda path: path.write_bytes(b"hello" * 300) and path, "cannot be read as a tar"),
    "an empty file": (lambda path: truncate(path, 0), "cannot be read as a tar: empty file"),
    "compressed": (lambda path: path.rename(path.with_name("x.tar.gz")), "x.tar.gz is compressed"),
    "not there": (lambda path: path.with_name("y.tar"), "y.tar cannot be read: No such file"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_incomplete_tar_is_refused_by_name(damage, tmp_path):
    spoiled, message = DAMAGED[damage]
    path = spoiled(shard(tmp_path / "x.tar", labelled(range(4))))
    with pytest.raises(ConfigError, match=message) as refused:
        open_source(tar_config(path, val_fraction=0.5), "train")
    assert str(path) in str(refused.value)


def test_a_flipped_bit_gives_samples_or_an_error(tmp_path):
    long = "d/" * 80 + "x" * 120
    members = labelled(range(3)) | {
        f"{long}.png": png(0),
        f"{long}.cls": b"1",
        "\udcff.png": png(1),
        "\udcff.cls": b"1",
    }
    draw, output = random.Random(0), []
    full = shard(tmp_path / "x.tar", members, errors="surrogateescape", encoding="utf-8").read_bytes()
    for _ in range(1000):
        broken = bytearray(full)
        broken[draw.randrange(len(full.rstrip(b"\0")))] ^= 1 << draw.randrange(8)
        try:
            read_headers(io.BytesIO(broken), "x.tar")
        except ConfigError as error:
            output.append(str(error))
    assert len(output) > 100
    for message in output:
        assert message.startswith("x.tar")
        message.encode()


FOLDERS = {
    "nothing": ({}, {}, "have no shard"),
    "train alone": ({"train/a.tar": 1}, {}, "has no shard in val/"),
    "some outside": ({"train/a.tar": 1, "val/a.tar": 1, "b.tar": 1}, {}, r"has b\.tar outside train/ and val/"),
    "a fraction with two parts": ({"train/a.tar": 1, "val/a.tar": 1}, {"val_fraction": 0.1}, "would be ignored"),
    "one set and no share": ({"a.tar": 1}, {}, r"data\.val_fraction=0\.1 for example"),
    "one is compressed": ({"a.tar": 1, "b.tar.gz": 1}, {"val_fraction": 0.1}, r"b\.tar\.gz is compressed"),
    "a list of others": ({"a.tar": 1, "x.txt": "a.zip"}, {}, r"x\.txt names a\.zip, which does not end in \.tar"),
    "an empty list": ({"a.tar": 1, "x.txt": "\n"}, {}, r"x\.txt names no shard"),
    "a shard twice": ({"a.tar": 1, "x.txt": "a.tar\na.tar"}, {}, r"x\.txt names .*a\.tar twice"),
    "a class twice": ({"a.tar": 1, "classes.txt": "a\nb\na"}, {"val_fraction": 0.5}, r"classes\.txt must name each"),
    "too few classes": ({"a.tar": 1, "classes.txt": "a\n"}, {"val_fraction": 0.5}, "labels up to 2, and there are 1"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_of_shards_that_cannot_be_used_is_refused(what, tmp_path):
    files, changes, message = FOLDERS[what]
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        else:
            shard(tmp_path / name, labelled(range(9)))
    path = tmp_path / "x.txt" if "x.txt" in files else tmp_path
    with pytest.raises(ConfigError, match=message):
        open_source(tar_config(path, **changes), "train")


def test_labels_of_validation_alone_are_refused(tmp_path):
    shard(tmp_path / "train" / "0.tar", labelled(range(3)))
    shard(tmp_path / "val" / "0.tar", labelled([5], label=lambda number: 7))
    with pytest.raises(ConfigError, match="the validation set has labels up to 7, and there are 3 classes"):
        open_source(tar_config(tmp_path), "val")
    shard(tmp_path / "val" / "0.tar", {"a.png": png(0)})
    with pytest.raises(ConfigError, match="the validation set has no labels, and there are 3 classes"):
        open_source(tar_config(tmp_path), "val")


def send(source, pipe) -> None:
    pipe.send([int(source.image(i)[0, 0, 0]) for i in range(len(source))])


def test_another_process_reads_the_same_images(tmp_path):
    path = shard(tmp_path / "x.tar", labelled(range(8)))
    source = open_source(tar_config(path, val_fraction=0.5), "train")
    before = [int(source.image(i)[0, 0, 0]) for i in range(len(source))]
    # Forked, as a loading process is; a spawned process gets the pickled source.
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=send, args=(source, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == before
    process.join()
    assert [int(source.image(i)[0, 0, 0]) for i in range(len(source))] == before
    sent = pickle.loads(pickle.dumps(source))
    assert all(torch.equal(source.image(i), sent.image(i)) for i in range(len(source)))


def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path):
    path = shard(tmp_path / "x.tar", labelled(range(8)))
    source = open_source(tar_config(path, val_fraction=0.5), "train")
    truncate(path, 1024)
    with pytest.raises(ConfigError, match=r"x\.tar is another file than was listed; .* start it again"):
        source.image(0)
    source = open_source(tar_config(shard(path, labelled(range(8))), val_fraction=0.5), "train")
    source.image(0)
    truncate(path, 1024)
    with pytest.raises(ConfigError, match=r"x\.tar ends before byte [\d,]+, where an image ends"):
        source.image(len(source) - 1)


def test_more_shards_than_may_stay_open_are_read(tmp_path, monkeypatch):
    from megavit.data.sources import tar_shards as shards

    monkeypatch.setattr(shards, "_MAX_OPEN", 2)
    for number in range(6):
        shard(tmp_path / f"{number}.tar", labelled([number]))
    source = open_source(tar_config(tmp_path, val_fraction=0.3), "train")
    before = len(os.listdir("/proc/self/fd"))
    assert [number for number, _ in pairs(source)] == sorted(number for number, _ in pairs(source))
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_an_image_that_cannot_be_read_is_named_by_shard_and_member(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.jpg": b"no picture", "b.jpg": b"no picture"})
    with pytest.raises(ConfigError, match=r"x\.tar, [ab]\.jpg cannot be read as an image"):
        open_source(tar_config(path, val_fraction=0.5), "train").image(0)


def test_only_tars_and_lists_may_be_urls():
    with pytest.raises(
        ConfigError, match=r"data\.path=s3://x/y is a URL, and data\.source=folder reads this machine's"
    ):
        source_config("s3://x/y", "folder")
    assert replace(tar_config("s3://x/y")).path == "s3://x/y"
