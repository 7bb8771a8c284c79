"""Images from folders and parquet files: what is found, what is refused, and the network's input."""

import io
import os
import random
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.config.compose import compose
from megavit.data.decode import decode_image
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sampler import SampleKey
from megavit.data.sources.image_files import find_images
from megavit.data.sources.open import open_source
from megavit.data.transforms.image import ImageTransform
from megavit.errors import ConfigError

DATA = os.environ.get("MEGAVIT_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEGAVIT_TEST_DATA names no folder of real images")


def write(path: Path, value: int = 0, size: tuple[int, int] = (10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def folder_config(path: Path, **changes):
    return replace(compose(["data=folder", "recipe=null", f"data.path='{path}'"]).data, **changes)


def paths(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


@pytest.fixture
def one_set(tmp_path):
    for name, count in (("ant", 20), ("bee", 10), ("cat", 1)):
        for index in range(count):
            write(tmp_path / name / ("deep" if index % 2 else ".") / f"{index}.PNG", index)
    return tmp_path


def test_classes_are_the_sorted_folders_and_images_may_be_in_subfolders(one_set):
    source = open_source(folder_config(one_set, val_fraction=0.2), "train")
    assert source.classes == ("ant", "bee", "cat")
    assert np.bincount([source.label(i) for i in range(len(source))]).tolist() == [16, 8, 1]
    assert source.image(0).shape == (3, 8, 10)


def test_the_two_splits_of_one_set_are_disjoint_complete_and_always_the_same(one_set):
    config = folder_config(one_set, val_fraction=0.2)
    parts = {split: paths(open_source(config, split)) for split in ("train", "val")}
    assert sorted(parts["train"] + parts["val"]) == sorted(str(path) for path in one_set.rglob("*.PNG"))
    assert not set(parts["train"]) & set(parts["val"])
    assert parts["val"] == paths(open_source(config, "val"))


def test_two_folders_are_the_two_parts(tmp_path):
    write(tmp_path / "train" / "a" / "1.png", 1)
    write(tmp_path / "train" / "b" / "2.jpg", 2)
    write(tmp_path / "val" / "a" / "3.png", 3)
    write(tmp_path / "val" / "b" / "4.png", 4)
    assert [len(open_source(folder_config(tmp_path), split)) for split in ("train", "val")] == [2, 2]
    assert open_source(folder_config(tmp_path), "val").image(0)[0, 0, 0] == 3


@pytest.mark.parametrize(("training", "validation"), [("Train", "Val"), ("training", "validation"), ("train", "test")])
def test_two_folders_by_other_words_are_the_two_parts(training, validation, tmp_path):
    write(tmp_path / training / "a" / "1.png", 1)
    write(tmp_path / validation / "a" / "2.png", 2)
    assert [len(open_source(folder_config(tmp_path), split)) for split in ("train", "val")] == [1, 1]
    assert open_source(folder_config(tmp_path), "val").image(0)[0, 0, 0] == 2
    with pytest.raises(ConfigError, match=rf"would be ignored: .* has {training}/ and {validation}/"):
        open_source(folder_config(tmp_path, val_fraction=0.5), "train")


@pytest.mark.parametrize("names", [("training", "validation", "valid"), ("Test", "testing")])
def test_words_for_splits_are_no_classes(names, tmp_path):
    for name in names:
        write(tmp_path / name / "a" / "1.png")
        write(tmp_path / name / "a" / "2.png")
    with pytest.raises(ConfigError, match=r"has .*test.*/|has .*valid.*/, which are names of splits"):
        open_source(folder_config(tmp_path, val_fraction=0.5), "train")


def test_a_class_without_validation_images_keeps_its_label(tmp_path):
    for name in ("train/apple", "train/lime", "train/sky", "val/apple", "val/sky"):
        write(tmp_path / name / "1.png")
    (tmp_path / "val" / "lime").mkdir()
    train, val = (open_source(folder_config(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ("apple", "lime", "sky")
    assert [val.classes[val.label(index)] for index in range(len(val))] == ["apple", "sky"]
    assert val.label_counts().tolist() == [1, 0, 1]
    for name in ("apple", "sky"):
        (tmp_path / "val" / name / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"/val holds no image"):
        open_source(folder_config(tmp_path), "val")


def test_a_class_whose_name_is_no_utf8_is_escaped_and_can_be_chosen(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        for number in (1, 2):
            write(tmp_path / os.fsdecode(name) / f"{number}.png", number)
    config = folder_config(tmp_path, val_fraction=0.5)
    source = open_source(config, "train")
    assert source.classes == ("caf\\xe9", "tea")
    assert source.image(0).shape[0] == 3
    for typed in ("caf\\xe9", os.fsdecode(b"caf\xe9")):
        assert open_source(replace(config, classes=[typed]), "train").classes == ("caf\\xe9",)
    (tmp_path / "caf\\xe9").mkdir()
    with pytest.raises(ConfigError, match="two folders whose names are printed as the same"):
        open_source(config, "train")


MISTAKES = {
    "absent": (lambda root: root / "nowhere", {}, "is not a folder"),
    "empty class": (lambda root: (root / "dog").mkdir() or root, {"val_fraction": 0.1}, "dog holds no image"),
    "no classes": (lambda root: (root / "x").mkdir() or root / "x", {"val_fraction": 0.1}, "has no class folders"),
    "one set and no share": (lambda root: root, {}, "data.val_fraction=0.1 for example"),
    "only singles": (
        lambda root: write(root / "s" / "a" / "1.png") or root / "s",
        {"val_fraction": 0.5},
        "one image per class",
    ),
    "only train": (lambda root: (root / "t" / "train").mkdir(parents=True) or root / "t", {}, "has only train/"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_cannot_be_used_is_refused_by_name(mistake, one_set):
    make, changes, message = MISTAKES[mistake]
    config = folder_config(make(one_set), **changes)
    with pytest.raises(ConfigError, match=message):
        open_source(config, "train")


def test_a_fraction_with_two_folders_and_a_class_only_in_validation_are_refused(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        write(tmp_path / split / name / "1.png")
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.1 would be ignored"):
        open_source(folder_config(tmp_path, val_fraction=0.1), "train")
    with pytest.raises(ConfigError, match=r"has classes that .*train lacks: b"):
        open_source(folder_config(tmp_path), "val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "needs data.path=FOLDER"),
        ({"channels": 4}, "data.mean=.* has 3 values and data.channels=4"),
        ({"crop_scale": [0.5, 0.2]}, "data.crop_scale"),
        ({"crop_pct": 1.5}, "data.crop_pct"),
        ({"source": "digits"}, "data.path=.* would be ignored by data.source=digits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        replace(folder_config(tmp_path), **changes).check()


def test_decoding_turns_scales_and_converts(tmp_path):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    turned = Image.fromarray(upright)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    got = decode_image(tmp_path / "turned.png", channels=3, name="x")
    assert torch.equal(got, torch.from_numpy(np.rot90(upright, -1).copy()).expand(3, -1, -1))
    deep = np.array([[0, 256, 65535, 32768]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert decode_image(tmp_path / "deep.png", channels=1, name="x").tolist() == [[[0, 1, 255, 128]]]


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ConfigError, match=r"broken\.jpg cannot be read as an image"):
        decode_image(tmp_path / "broken.jpg", channels=3, name=str(tmp_path / "broken.jpg"))


def test_a_broken_image_is_named_whatever_pillow_raises(tmp_path, monkeypatch):
    def open_badly(file):
        raise TypeError("'float' object cannot be interpreted as an integer")

    (tmp_path / "a.tif").write_bytes(b"II*")
    monkeypatch.setattr(Image, "open", open_badly)
    with pytest.raises(ConfigError, match=r"^a\.tif cannot be read as an image: 'float' object"):
        decode_image(tmp_path / "a.tif", channels=3, name="a.tif")


def with_faults(root: Path) -> dict[str, str | tuple[int, int]]:
    """A folder with one image of each fault; the message about it, or its height and width."""
    square = Image.effect_noise((40, 30), 60)
    colours = square.convert("RGB")
    encoded = io.BytesIO()
    colours.save(encoded, "JPEG")
    complete = encoded.getvalue()
    (root / "truncated.jpg").write_bytes(complete[: len(complete) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("no picture")
    colours.convert("CMYK").save(root / "cmyk.jpg")
    colours.quantize(8).save(root / "palette.png")
    square.save(root / "grey.png")
    Image.fromarray(np.full((30, 40), 4000, dtype=np.uint16)).save(root / "deep.png")
    colours.convert("RGBA").save(root / "alpha.png")
    colours.resize((1, 1)).save(root / "one.png")
    exif = colours.getexif()
    exif[0x0112] = 8
    colours.save(root / "turned.jpg", exif=exif)
    colours.save(root / "moving.gif", save_all=True, append_images=[square.convert("RGB")])
    Image.new("1", (12_000, 12_000)).save(root / "bomb.png")
    colours.save(root / "naïve photo, 東京.png")
    colours.save(root.parent / "outside.png")
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "loop").symlink_to(root)
    there = {"cmyk.jpg", "palette.png", "grey.png", "deep.png", "alpha.png", "moving.gif", "link.png"}
    return {
        **dict.fromkeys(there | {"naïve photo, 東京.png"}, (30, 40)),
        "one.png": (1, 1),
        "turned.jpg": (40, 30),
        "truncated.jpg": "image file is truncated",
        "empty.jpg": "Pillow does not know its format",
        "text.jpg": "Pillow does not know its format",
        "bomb.png": "it has 12,000 × 12,000 pixels, and 89,478,485 are decoded at most",
    }


def test_one_of_each_fault_is_converted_or_named(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    expected = with_faults(root)
    assert (root / "bomb.png").stat().st_size < 20_000
    found = find_images(root)
    assert {path.name for path in found} == expected.keys()
    assert len(found) == len(expected)
    tracemalloc.start()
    for path in found:
        what = expected[path.name]
        if isinstance(what, str):
            with pytest.raises(ConfigError, match=re.escape(f"{path.name} cannot be read as an image: {what}")):
                decode_image(path, channels=3, name=path.name)
        else:
            assert decode_image(path, channels=3, name=path.name).shape == (3, *what), path.name
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    deep = decode_image(root / "deep.png", channels=3, name="deep")
    assert (deep == 4000 >> 8).all()


def test_a_flipped_bit_gives_a_picture_or_an_error(tmp_path):
    draw, encoded = random.Random(0), io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(encoded, "JPEG")
    complete, output = encoded.getvalue(), []
    for _ in range(300):
        broken = bytearray(complete)
        broken[draw.randrange(len(complete))] ^= 1 << draw.randrange(8)
        try:
            assert decode_image(bytes(broken), channels=3, name="x").shape[0] == 3
        except ConfigError as error:
            output.append(str(error))
    assert output
    assert all(message.startswith("x cannot be read as an image: ") for message in output)


KEYS = [SampleKey(3, 0), SampleKey(4, 0), SampleKey(3, 1), SampleKey(3, 0, 1)]


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_training_view_is_a_function_of_its_key_and_leaves_the_generator_alone(tmp_path):
    view, image = ImageTransform(folder_config(tmp_path, image_size=[16, 24]), augment=True), noise(40, 60)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seen = view([image] * 4, KEYS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(one.shape == (3, 16, 24) and one.dtype == torch.uint8 for one in seen)
    again = view([image] * 4, KEYS[::-1], seed=0)[::-1]
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
    # Another sample, epoch, occurrence or seed is another view.
    others = [*seen[1:], view([image], KEYS[:1], seed=1)[0]]
    assert not any(torch.equal(seen[0], other) for other in others)


def test_a_training_view_seeds_no_device(tmp_path, monkeypatch):
    # On a GPU dropout uses CUDA's generators, which nothing would restore; this checks the call and needs no GPU.
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    ImageTransform(folder_config(tmp_path, image_size=[16, 24]), augment=True)([noise(40, 60)] * 4, KEYS, seed=0)
    assert not seeded


def test_half_of_the_images_are_mirrored(tmp_path):
    view, image = (
        ImageTransform(folder_config(tmp_path, crop_scale=None, image_size=[8, 8], crop_pct=None), augment=True),
        noise(8, 8),
    )
    seen = view([image] * 1000, [SampleKey(i, 0) for i in range(1000)], seed=0)
    mirrored = sum(torch.equal(one, image.flip(2)) for one in seen)
    assert mirrored + sum(torch.equal(one, image) for one in seen) == 1000
    assert abs(mirrored - 500) < 4.5 * 1000**0.5 / 2


@pytest.mark.parametrize("shape", [(40, 60), (300, 20), (16, 24), (7, 5)])
def test_an_evaluation_view_covers_the_frame_and_is_always_the_same(shape, tmp_path):
    view = ImageTransform(folder_config(tmp_path, image_size=[16, 24]), augment=False)
    first, second = (view([noise(*shape)], [key], seed=seed)[0] for key, seed in ((KEYS[0], 0), (KEYS[1], 1)))
    assert first.shape == (3, 16, 24)
    assert torch.equal(first, second)


def test_the_centre_of_a_larger_frame_is_evaluated(tmp_path):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 16:48, 16:48] = 255
    view = ImageTransform(folder_config(tmp_path, image_size=[32, 32], crop_pct=0.5), augment=False)
    assert (view([image], KEYS[:1], seed=0)[0] == 255).all()


@needs_data
def test_cifar10_in_parquet_is_the_same_as_its_exported_folder(tmp_path):
    config = replace(compose(["data=cifar10", "recipe=null", f"data.path='{DATA}'"]).data)
    rows = open_source(config, "val")
    assert (len(rows), len(open_source(config, "train")), len(rows.classes)) == (10_000, 50_000, 10)
    for index in range(60):
        for split in ("train", "val"):
            path = tmp_path / split / rows.classes[rows.label(index)] / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rows.image(index).permute(1, 2, 0).numpy()).save(path)
    folder = open_source(replace(config, source="folder", path=str(tmp_path)), "val")
    exported = {Path(name).stem: place for place, name in enumerate(paths(folder))}
    for index in range(60):
        place = exported[f"{index:05d}"]
        assert torch.equal(folder.image(place), rows.image(index))
        assert folder.classes[folder.label(place)] == rows.classes[rows.label(index)]


@needs_data
def test_one_photograph_per_class_cannot_be_divided():
    config = folder_config(Path(DATA) / "imagenet_sample", val_fraction=0.1)
    with pytest.raises(ConfigError, match="one image per class"):
        open_source(config, "train")


@pytest.fixture
def photographs(tmp_path):
    """Return the sample's first eight classes, each for both training and validation."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for folder in sorted((Path(DATA) / "imagenet_sample").iterdir())[:8]:
            (tmp_path / split / folder.name).symlink_to(folder)
    return tmp_path


def load(path: Path, *, train: bool, workers: int, micro_batch: int = 4) -> Loader:
    config = folder_config(path, workers=workers)
    layout = SimpleNamespace(tp=1, tp_rank=0, pp=1, vpp=1, dp=1, dp_rank=0, device=torch.device("cpu"), groups=None)
    return Loader(
        open_source(config, "train" if train else "val"),
        config,
        layout=layout,
        fields=RequiredFields(images=True, targets=("labels",)),
        micro_batch=micro_batch,
        seed=0,
        train=train,
    )


@needs_data
def test_real_photographs_of_all_sizes_become_batches(photographs):
    source = open_source(folder_config(photographs), "train")
    assert len({source.image(index).shape for index in range(8)}) > 4
    (batch,) = load(photographs, train=True, workers=0, micro_batch=8).train_batches(0, num_steps=1, global_batch=8)
    assert batch.images_BCYX.shape == (8, 3, 224, 224)
    assert sorted(batch.targets["labels"].tolist()) == list(range(8))
    (evaluated,) = load(photographs, train=False, workers=0, micro_batch=8).evaluation_batches()
    assert evaluated.images_BCYX.shape == (8, 3, 224, 224)
    assert evaluated.images_BCYX.dtype == torch.uint8


@needs_data
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same_crops_as_the_training_process(workers, photographs):
    here, there = (
        list(load(photographs, train=True, workers=number).train_batches(4, num_steps=2, global_batch=4))
        for number in (0, workers)
    )
    assert [batch.keys for batch in here] == [batch.keys for batch in there]
    assert all(torch.equal(one.images_BCYX, two.images_BCYX) for one, two in zip(here, there, strict=True))


def test_parquet_files_that_cannot_be_used_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    config = replace(folder_config(tmp_path), source="parquet")
    with pytest.raises(ConfigError, match="it has none"):
        open_source(config, "train")
    pq.write_table(pa.table({"x": [1, 2], "y": [3, 4]}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="one column of images, and one of integer labels"):
        open_source(replace(config, path=str(tmp_path / "rows.parquet"), val_fraction=0.5), "train")
