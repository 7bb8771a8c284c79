"""Remote data over http and in a store that can list: the bytes that are requested, and the errors."""

import os
from importlib.util import find_spec
from types import SimpleNamespace

import fsspec
import pytest
import torch

from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources import remote
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from tests.data.sources.tars import labelled, png, shard
from tests.data.sources.test_sources import config, pairs
from tests.data.sources.web import serve

needs_http = pytest.mark.skipif(
    find_spec("aiohttp") is None,
    reason="fsspec reads http through aiohttp, which is not installed",
)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0))


@pytest.fixture
def tars(tmp_path):
    """Write two shards for training, one for validation and a list of them."""
    root = tmp_path / "served"
    shard(root / "train-0.tar", labelled(range(6)))
    shard(root / "train-1.tar", labelled(range(6, 9)))
    shard(root / "val-0.tar", labelled([20, 21]))
    (root / "shards.txt").write_text("train-0.tar\ntrain-1.tar\nval-0.tar?signed=yes\n")
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    for path in root.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return root


@pytest.fixture
def memory():
    """Return an empty store in this process's memory."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


@needs_http
def test_shards_that_a_list_names_are_read_over_http_image_by_image(tars, tmp_path):
    with serve(tars) as (url, asked):
        here = open_source(config(tars, "tar"), "train")
        data = config(f"{url}/shards.txt", "tar")
        there = open_source(data, "train", index=tmp_path / "index")
        assert pairs(there) == pairs(here)
        assert there.classes == ("ant", "bee", "cat")
        assert there.name(0) == f"{url}/train-0.tar, 000000.png"
        assert pairs(open_source(data, "val")) == [(20, "cat"), (21, "ant")]
        asked.clear()
        again = open_source(data, "train", index=tmp_path / "index")
        again.image(7)
        # The cached index: no header is read again, and only the image's own bytes are.
        reads = [line for line in asked if "GET" in line and ".tar" in line]
        assert len(reads) == 1
        first, last = map(int, reads[0].partition("bytes=")[2].split("-"))
        assert last + 1 - first == len(png(7))
        os.utime(tars / "train-0.tar", ns=(10**18 + 1, 10**18 + 1))
        asked.clear()
        assert pairs(open_source(data, "train", index=tmp_path / "index")) == pairs(here)
        assert [line for line in asked if line.startswith("GET /train-0.tar bytes=0-")]


@needs_http
@pytest.mark.parametrize("workers", [0, 2])
def test_loading_processes_read_over_http_after_the_training_process_has(workers, tars):
    with serve(tars) as (url, _):
        data = config(f"{url}/shards.txt", "tar", workers=workers, image_size=[4, 6], crop_scale=None)
        source = open_source(data, "train")
        source.image(0)
        layout = SimpleNamespace(tp=1, tp_rank=0, pp=1, vpp=1, dp=1, dp_rank=0, device=torch.device("cpu"), groups=None)
        fields = RequiredFields(images=True, targets=("labels",))
        loader = Loader(source, data, layout=layout, fields=fields, micro_batch=3, seed=0, train=False)
        batches = list(loader.evaluation_batches())
        assert [int(image[0, 0, 0]) for batch in batches for image in batch.images_BCYX] == list(range(9))


@needs_http
def test_one_shard_over_http_is_divided(tars):
    with serve(tars) as (url, _):
        parts = [
            open_source(config(f"{url}/train-0.tar?a=b", "tar", val_fraction=0.5), split) for split in ("train", "val")
        ]
        assert sorted(number for part in parts for number, _ in pairs(part)) == list(range(6))


@needs_http
def test_a_list_of_images_and_the_images_are_read_over_http(tars):
    for number in range(4):
        (tars / f"{number}.png").write_bytes(png(number))
    with serve(tars) as (url, _):
        lines = ["path,label", "0.png,a", f"{url}/1.png,b"]
        (tars / "train.csv").write_text("\n".join(lines))
        (tars / "val.csv").write_text("path,label\n2.png,b\n")
        assert pairs(open_source(config(url, "csv"), "train")) == [(0, "a"), (1, "b")]
        assert pairs(open_source(config(url, "csv"), "val")) == [(2, "b")]
        # A list on this machine may name remote images.
        assert open_source(config(tars, "csv"), "train").name(1) == f"{url}/1.png"
        (tars / "train.csv").write_text("path,label\n/0.png,a\n")
        with pytest.raises(ConfigError, match=r"line 2: /0\.png is a path on one machine"):
            open_source(config(url, "csv"), "train")
        (tars / "train.csv").write_text("path,label\nnowhere.png,a\n")
        with pytest.raises(ConfigError, match=rf"line 2: {url}/nowhere\.png does not exist"):
            open_source(config(url, "csv"), "train")


@needs_http
def test_a_server_that_fails_for_a_moment_is_retried(tars):
    with serve(tars, fails=2) as (url, asked):
        assert remote.read(f"{url}/classes.txt") == b"ant\nbee\ncat\n"
        assert len(asked) == 3
    with (
        serve(tars, fails=9) as (url, _),
        pytest.raises(ConfigError, match=rf"{url}/classes\.txt cannot be read: .*503"),
    ):
        remote.read(f"{url}/classes.txt")


@needs_http
def test_errors_of_a_server_name_the_url(tars):
    with serve(tars, ranges=False) as (url, _):
        with pytest.raises(ConfigError, match=rf"{url}/train-0\.tar: its server does not serve parts of files"):
            open_source(config(f"{url}/train-0.tar", "tar", val_fraction=0.5), "train")
        with pytest.raises(
            ConfigError, match=r"100 bytes from 512 on were requested, and \d+ received; .*does not serve parts"
        ):
            remote.read_range(f"{url}/train-0.tar", 512, 100)
    with serve(tars) as (url, _):
        with pytest.raises(ConfigError, match=rf"{url}/x\.tar cannot be read: it does not exist"):
            open_source(config(f"{url}/x.tar", "tar", val_fraction=0.5), "train")
        with pytest.raises(ConfigError, match=r"a web server cannot list its files; name one \.tar"):
            open_source(config(url, "tar"), "train")
        (tars / "val-0.tar").write_bytes((tars / "val-0.tar").read_bytes()[:520])
        with pytest.raises(ConfigError, match=rf"{url}/val-0\.tar\?signed=yes ends within 000020"):
            open_source(config(f"{url}/shards.txt", "tar"), "val")
    with pytest.raises(ConfigError, match=rf"{url}/\S+ cannot be read: "):
        open_source(config(f"{url}/shards.txt", "tar"), "train")


def test_a_store_that_can_list_is_a_folder(memory):
    import io
    import tarfile

    for name, numbers in {"train/a.tar": range(6), "train/b.tar": range(6, 9), "val/a.tar": [20]}.items():
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for member, data in labelled(numbers).items():
                about = tarfile.TarInfo(member)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
        memory.pipe(f"/shards/{name}", content.getvalue())
    parts = [open_source(config("memory://shards", "tar"), split) for split in ("train", "val")]
    assert [number for number, _ in pairs(parts[0])] == list(range(9))
    assert pairs(parts[1]) == [(20, "2")]
    assert parts[0].name(8) == "memory://shards/train/b.tar, 000008.png"
    one_set = [
        open_source(config("memory://shards/train", "tar", val_fraction=0.3), split) for split in ("train", "val")
    ]
    assert sum(len(part) for part in one_set) == 9
    memory.pipe("/shards/c.tar", b"")
    with pytest.raises(ConfigError, match=r"memory://shards has c\.tar outside train/ and val/"):
        open_source(config("memory://shards", "tar"), "train")


def test_a_list_in_a_store_is_read(memory):
    for number in range(4):
        memory.pipe(f"/lists/images/{number}.png", png(number))
    lines = ["path,label", *(f"images/{number}.png,{'ab'[number % 2]}" for number in range(4))]
    memory.pipe("/lists/all.csv", "\n".join(lines).encode())
    parts = [
        open_source(config("memory://lists/all.csv", "csv", val_fraction=0.5), split) for split in ("train", "val")
    ]
    assert sorted(pairs(parts[0]) + pairs(parts[1])) == [(number, "ab"[number % 2]) for number in range(4)]


def test_a_missing_package_and_an_unknown_store_are_named(monkeypatch):
    from fsspec import core

    def without_s3fs(url):
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(
        ConfigError, match=r"^nosuch://x/a\.tar cannot be opened: ValueError Protocol not known: nosuch"
    ):
        open_source(config("nosuch://x/a.tar", "tar", val_fraction=0.5), "train")
    monkeypatch.setattr(core, "url_to_fs", without_s3fs)
    fields = r"^s3://x/a\.tar needs a package that is not installed \(Install s3fs to access S3\); pip install s3fs"
    with pytest.raises(ConfigError, match=fields):
        open_source(config("s3://x/a.tar", "tar", val_fraction=0.5), "train")
