"""Test the preprocessing settings of an export: read back, they give the network the same images."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

import megavit
from megavit.checkpoint.convert.hf_hub import check_hf_compatible, hf_preprocessor
from megavit.checkpoint.convert.write import write_tensors
from megavit.config.compose import compose
from megavit.data.config import DataConfig
from megavit.data.transforms.resize import center_box, eval_frame
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig
from tests.checkpoint.convert.test_convert import HF, SIZES, refused, shake
from tests.trained import run_command, train, train_small

DATA = os.environ.get("MEGAVIT_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEGAVIT_TEST_DATA names no folder of real images")


def convert(*arguments: object) -> str:
    """Return the command's output."""
    code, out, err = run_command("convert", *arguments)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Make a folder of photographs in two alternating classes; return it and their paths."""
    folder = tmp_path_factory.mktemp("photographs")
    paths = sorted(path for path in (Path(DATA) / "imagenet_sample").rglob("*") if path.is_file())
    links = [folder / "ab"[number % 2] / path.name for number, path in enumerate(paths)]
    for link, path in zip(links, paths, strict=True):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)
    return folder, links


def normalised_by_hf(folder: Path, pictures: list[Image.Image]) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(pictures, return_tensors="pt")["pixel_values"]


def normalised_by_timm(model: torch.nn.Module, pictures: list[Image.Image]) -> torch.Tensor:
    see = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([see(picture) for picture in pictures])


def trained_on(photographs: Path, run: Path, *overrides: str) -> Path:
    small = "model.hidden_size=64 model.ffn_size=128 model.num_heads=2 model.num_layers=2 model.patch_size=16"
    keys = ["data=folder", f"data.path={photographs}", "data.val_fraction=0.2", "data.workers=0", *small.split()]
    train([*keys, "optim.lr=3e-3", "run.preflight=false", f"run.dir={run}", *overrides])
    return run


def read_back(run: Path, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the inputs that transformers and timm compute with a run's exports."""
    convert(f"from={run}", f"to=hf:{folder / 'hf'}")
    convert(f"from={run}", f"to=timm:{folder / 'timm' / 'model.safetensors'}")
    by_hf = transformers.AutoModelForImageClassification.from_pretrained(folder / "hf")
    return by_hf.eval(), timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()


@needs_data
@pytest.mark.parametrize("crop_pct", [0.875, None])
def test_transformers_and_timm_see_photographs_as_the_run_does(crop_pct, photographs, tmp_path, figure):
    folder, paths = photographs
    one_step = ["train.steps=1", "optim.warmup_steps=0", "train.global_batch=4", "optim.lr=1e-6"]
    sizes = ["data.image_size=[64,64]", "model.head_std=0.5", *([] if crop_pct else ["data.crop_pct=null"])]
    run = megavit.load(trained_on(folder, tmp_path / "run", *one_step, *sizes))
    by_hf, by_timm = read_back(tmp_path / "run", tmp_path)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    seen = run.read(*paths)
    theirs = {"hf": normalised_by_hf(tmp_path / "hf", pictures), "timm": normalised_by_timm(by_timm, pictures)}
    off = {name: (run.normalize.undo(view) * 255 - seen).abs().flatten(1).amax(dim=1) for name, view in theirs.items()}
    # transformers rounds the centre's place down, timm and torchvision to the nearest even pixel.
    moved = torch.tensor([crop_pct is not None and centre_differs(picture, run._data) for picture in pictures])
    figure(f"crop_pct={crop_pct}: transformers cuts {int(moved.sum())} of 100 photographs a pixel aside")
    assert (off["hf"][~moved] < 0.01).all()
    assert moved.sum() <= 10
    # Pillow rounds otherwise than torch. Measured: 2.
    assert (off["timm"] < 2.5).all()
    with torch.no_grad():
        ours = run(seen).softmax(dim=1)
        by = {"hf": by_hf(theirs["hf"]).logits.softmax(dim=1), "timm": by_timm(theirs["timm"]).softmax(dim=1)}
    assert ours.argmax(dim=1).bincount().max() < 85
    assert float((ours - by["hf"])[~moved].abs().max()) <= 1e-5
    figure(f"timm, crop_pct={crop_pct}: probabilities differ by up to {float((ours - by['timm']).abs().max()):.1e}")
    assert float((ours - by["timm"]).abs().max()) <= 0.02
    assert (ours.argmax(dim=1) == by["timm"].argmax(dim=1)).sum() >= 99


def centre_differs(picture: Image.Image, data) -> bool:
    frame = eval_frame((picture.height, picture.width), data.image_size, data.crop_pct)
    box = center_box(frame, data.image_size)
    return (box.top, box.left) != ((frame[0] - box.height) // 2, (frame[1] - box.width) // 2)


@needs_data
@pytest.mark.slow
def test_a_run_with_default_settings_gives_photographs_the_same_probabilities_elsewhere(photographs, tmp_path, figure):
    folder, paths = photographs
    run = trained_on(folder, tmp_path / "run", "train.steps=60", "optim.warmup_steps=5", "train.global_batch=20")
    by_hf, by_timm = read_back(run, tmp_path)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    loaded = megavit.load(run)
    with torch.no_grad():
        ours = loaded(loaded.read(*paths)).softmax(dim=1)
        for name, other in (
            ("transformers", by_hf(normalised_by_hf(tmp_path / "hf", pictures)).logits.softmax(dim=1)),
            ("timm", by_timm(normalised_by_timm(by_timm, pictures)).softmax(dim=1)),
        ):
            off, same = float((ours - other).abs().max()), int((ours.argmax(dim=1) == other.argmax(dim=1)).sum())
            figure(f"{name}: probabilities differ by up to {off:.1e}, top-1 agrees for {same} of 100")
            assert same >= 99
            assert off <= 0.02


def from_timm(folder: Path, **changes: object) -> tuple[torch.nn.Module, Path]:
    """Convert a timm model to a run; return both."""
    theirs = shake(timm.models.VisionTransformer(**{**SIZES, **changes}))
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "in.safetensors")
    heads = f"num_heads={theirs.blocks[0].attn.num_heads}"
    convert(f"from=timm:{folder / 'in.safetensors'}", f"to={folder / 'run'}", heads)
    return theirs, folder / "run"


VARIANTS = {
    "plain": {},
    "grey, mean pooling": dict(in_chans=1, global_pool="avg", fc_norm=True),
    "four channels": dict(in_chans=4),
    "layer scale, qk-norm": dict(init_values=0.1, qk_norm=True),
    "registers": dict(reg_tokens=4, no_embed_class=True, img_size=40),
    "no class token": dict(class_token=False, global_pool="avg", fc_norm=True),
    "no classifier": dict(num_classes=0),
    "an MLP of 66, 4 heads of 12": dict(embed_dim=48, mlp_ratio=66.5 / 48, num_heads=4),
}


SLOW = ("plain", "layer scale, qk-norm", "no class token")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow if v in SLOW else ()) for v in VARIANTS])
def test_timm_builds_the_network_from_the_folder_and_by_the_arguments_in_its_config(variant, tmp_path):
    theirs, run = from_timm(tmp_path / "in", **VARIANTS[variant])
    file = tmp_path / "out" / "model.safetensors"
    convert(f"from={run}", f"to=timm:{file}")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    arguments = {"num_classes": settings["num_classes"], **settings["model_args"]}
    side = VARIANTS[variant].get("img_size", 32)
    images = torch.randn(2, VARIANTS[variant].get("in_chans", 3), side, side)
    for opened in (
        timm.create_model(f"local-dir:{file.parent}", pretrained=True),
        timm.create_model(settings["architecture"], checkpoint_path=str(file), **arguments),
    ):
        with torch.no_grad():
            assert torch.equal(opened.eval()(images), theirs(images))
    assert settings["label_names"] == [str(index) for index in range(theirs.num_classes)]


def test_the_crop_of_the_evaluation_is_written_and_missing_biases_are_zeros(tmp_path):
    sizes = ["train.steps=3", "data.crop_pct=0.875", "data.interpolation=bilinear", "model.patch_bias=false"]
    run = train_small(tmp_path / "run", *sizes, "data.mean=[0.3]", "data.std=[0.4]")
    convert(f"from={run}", f"to=timm:{tmp_path / 'timm' / 'model.safetensors'}")
    opened = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    settings = resolve_data_config({}, model=opened)
    assert (settings["crop_pct"], settings["crop_mode"], settings["interpolation"]) == (0.875, "center", "bilinear")
    assert (settings["input_size"], settings["mean"], settings["std"]) == ((1, 8, 8), [0.3], [0.4])
    loaded = megavit.load(run)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        assert float((opened(loaded.normalize(images)) - loaded(images)).abs().max()) <= 1e-5
    assert "config.json exists already" in refused("convert", f"from={run}", f"to=timm:{tmp_path / 'timm' / 'b.bin'}")
    assert "is a folder; give a file in it" in refused("convert", f"from={run}", f"to=nemo:{empty(tmp_path)}")


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def data_of(*overrides: str) -> DataConfig:
    return compose(["recipe=null", "data=folder", "data.path=x", "model.patch_size=8", *overrides]).data


def test_hugging_faces_processor_crops_as_the_run_does_or_the_export_is_refused():
    written = hf_preprocessor(data_of("data.interpolation=bilinear", "data.image_size=[64,64]"))
    # 64 / 0.875 = 73.1.
    assert (written["size"], written["do_center_crop"], written["resample"]) == ({"shortest_edge": 73}, True, 2)
    assert written["crop_size"] == {"height": 64, "width": 64}
    assert written["do_convert_rgb"] is True
    squashed = hf_preprocessor(data_of("data.crop_pct=null", "data.image_size=[16,64]"))
    assert (squashed["size"], squashed["do_center_crop"]) == ({"height": 16, "width": 64}, False)
    check_hf_compatible(ModelConfig(), data_of("data.crop_pct=null", "data.image_size=[16,64]"), is_mae=False)
    with pytest.raises(ConfigError, match=r"image_size=\[16, 64\]: .* crops only squares; to=timm: supports it"):
        check_hf_compatible(ModelConfig(), data_of("data.image_size=[16,64]"), is_mae=False)


def test_files_that_carry_no_normalisation_say_so_with_the_values(tmp_path):
    _, run = from_timm(tmp_path / "in")
    assert re.search(
        r"nemo: files state no mean, std or crop; this run has data\.mean=\[0\.5,0\.5,0\.5\] "
        r"data\.std=\[0\.5,0\.5,0\.5\] data\.image_size=\[32,32\] data\.crop_pct=\S+ data\.interpolation=bicubic\n",
        convert(f"from={run}", f"to=nemo:{tmp_path / 'nemo.pt'}"),
    )


def test_a_model_without_a_classifier_is_exported_without_one(tmp_path):
    theirs = shake(transformers.ViTModel(transformers.ViTConfig(**HF)))
    theirs.save_pretrained(tmp_path / "in")
    convert(f"from=hf:{tmp_path / 'in'}", f"to={tmp_path / 'run'}")
    convert(f"from={tmp_path / 'run'}", f"to=hf:{tmp_path / 'out'}")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.startswith("classifier")]
    opened = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(opened(images).last_hidden_state, theirs(images).last_hidden_state)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_exported_files_have_the_mode_of_the_users_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~mask
    assert load_file(tmp_path / "model.safetensors")["a"].sum() == 2
