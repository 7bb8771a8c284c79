"""Test that imported models give their library's logits on image files, with any preprocessing that the files state."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf

from tests.checkpoint.convert.test_convert import shake
from tests.distributed import run_ranks
from tests.trained import refusal, run_command

SIZES = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=4, num_classes=7)
HF = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=32)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Make pictures of the size before the crop, so that no library resizes or rounds."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype="u1")).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


def scores(run: str, paths: list[Path], settings: list[str]) -> tuple[torch.Tensor, tuple[str, ...]]:
    import megavit

    model = megavit.load(run, *settings)
    with torch.no_grad():
        return model(model.read(*paths)), model.classes


def convert(*arguments: object) -> str:
    code, output, err = run_command("convert", *arguments)
    assert code == 0, err
    return output


def assert_scores(run: Path, paths: list[Path], wanted: torch.Tensor, *settings: str) -> tuple[str, ...]:
    got, classes = run_ranks(scores, 1, str(run), paths, list(settings))[0]
    # Measured: 7.2e-7.
    assert float((got - wanted).abs().max()) <= 1e-5
    return classes


def hf_folder(folder: Path, config: dict, processor: dict) -> torch.nn.Module:
    model = shake(transformers.ViTForImageClassification(transformers.ViTConfig(**HF, patch_size=8, num_labels=7)))
    model.save_pretrained(folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def test_hugging_faces_crop_numbers_and_pairs_give_its_logits(images, tmp_path):
    crop = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}
    processor = {**crop, "resample": 2, "image_mean": 0.4, "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 128}
    theirs = hf_folder(tmp_path / "hf", {"patch_size": [8, 8], "image_size": [32, 32]}, processor)
    output = convert(f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}")
    assert "data.crop_pct=0.8 data.interpolation=bilinear" in output
    assert "assumed" not in output
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")([Image.open(path) for path in images])
    with torch.no_grad():
        wanted = theirs(torch.stack(list(pixels["pixel_values"]))).logits
    # LABEL_0, LABEL_1, … are transformers' placeholders.
    assert assert_scores(tmp_path / "run", images, wanted) == tuple("0123456")


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({"patch_size": [8, 4]}, {"size": 32}, "patch_size=[8, 4]: megavit's patches are square"),
        ({"num_channels": 1}, {"size": 32, "image_mean": [0.5] * 3}, "has 3 values and the model takes images of 1"),
        ({}, {"size": 32, "image_std": 0.0}, "data.std=[0.0, 0.0, 0.0] must be positive"),
        ({"model_type": None}, {}, "config.json states no model_type; vit and vit_mae can be converted"),
        ({"model_type": None, "architecture": "vit_x"}, {}, "is a timm folder (vit_x); use timm:"),
        ({"num_attention_heads": 3}, {"size": 32}, "is not divisible by model.num_heads=3"),
        ({"hidden_size": "wide"}, {"size": 32}, "hidden_size='wide' must be a whole number"),
    ],
)
def test_a_folder_that_makes_no_run_is_refused_before_anything_is_saved(config, processor, message, tmp_path):
    hf_folder(tmp_path / "hf", config, processor)
    assert message in refusal("convert", f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def normalised(images: list[Path], mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    transform = create_transform((3, 32, 32), crop_pct=0.8, mean=mean, std=std, interpolation="bicubic")
    return torch.stack([transform(Image.open(path)) for path in images])


def test_maes_classifier_is_seen_as_mae_does_and_other_pixels_can_be_typed(images, tmp_path):
    theirs = shake(timm.models.VisionTransformer(**SIZES, global_pool="avg"))
    torch.save({"model": theirs.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "ft.pth")
    output = convert(f"from=mae:{tmp_path / 'ft.pth'}", f"to={tmp_path / 'run'}", "num_heads=4")
    assert "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225] data.crop_pct=0.875" in output
    assert output.splitlines()[-1] == "assumed: GELU, eps 1e-6"
    with torch.no_grad():
        imagenet = theirs(normalised(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        others = theirs(normalised(images, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert_scores(tmp_path / "run", images, imagenet, "data.crop_pct=0.8")
    typed = ["data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]", "data.crop_pct=0.8"]
    assert_scores(tmp_path / "run", images, others, *typed)
    code, _, err = run_command(
        "predict",
        f"from={tmp_path / 'run'}",
        f"images={images[0].parent}",
        f"out={tmp_path / 'p.jsonl'}",
        "top=7",
        *typed,
    )
    assert code == 0, err
    for line, logits in zip((tmp_path / "p.jsonl").read_text().splitlines(), others, strict=True):
        got = {guess["class"]: guess["probability"] for guess in json.loads(line)["guesses"]}
        assert [got[str(k)] for k in range(7)] == pytest.approx(logits.softmax(0).tolist(), abs=1e-6)
    into = convert(f"from=mae:{tmp_path / 'ft.pth'}", f"to={tmp_path / 'typed'}", "num_heads=4", *typed)
    assert "data.mean=[0.1,0.2,0.3] data.std=[0.4,0.5,0.6] data.crop_pct=0.8" in into
    assert_scores(tmp_path / "typed", images, others)


def test_wrong_pixel_settings_are_refused_by_every_command_that_takes_them(images, tmp_path):
    torch.save(timm.models.VisionTransformer(**SIZES).state_dict(), tmp_path / "a.pth")
    into = ["convert", f"from=timm:{tmp_path / 'a.pth'}", f"to={tmp_path / 'run'}", "num_heads=4"]
    assert "data.mean=[0.5] has 1 values and data.channels=3" in refusal(*into, "data.mean=[0.5]")
    convert(*into[1:])
    predict = ["predict", f"from={tmp_path / 'run'}", f"images={images[0].parent}"]
    assert "data.std=[0.1, 0.2, 0.0] must be positive" in refusal(*predict, "data.std=[0.1,0.2,0]")
    assert "data.crop_pct=2.0 must be a finite number above 0" in refusal(*predict, "data.crop_pct=2")
    out = ["convert", f"from={tmp_path / 'run'}", f"to=timm:{tmp_path / 'out' / 'b.safetensors'}"]
    assert "data.crop_pct=1 would be ignored: a run states" in refusal(*out, "data.crop_pct=1")


def test_timms_folder_gives_its_logits_and_a_file_alone_says_what_is_assumed(images, tmp_path):
    theirs = shake(timm.create_model("vit_tiny_patch16_224", **SIZES))
    save_for_hf(theirs, tmp_path / "timm", safe_serialization=True)
    stated = json.loads((tmp_path / "timm" / "config.json").read_text())
    stated["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.8}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(stated))
    output = convert(f"from=timm:{tmp_path / 'timm'}", f"to={tmp_path / 'run'}")
    assert "states: vit_tiny_patch16_224, 4 heads, GELU, eps 1e-6, class token" in output
    assert "assumed" not in output
    with torch.no_grad():
        wanted = theirs(normalised(images, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)))
    assert_scores(tmp_path / "run", images, wanted)
    (tmp_path / "timm" / "config.json").unlink()
    output = convert(f"from=timm:{tmp_path / 'timm'}", f"to={tmp_path / 'alone'}")
    assert output.splitlines()[-2:] == [
        "assumed: 2 heads, GELU, eps 1e-6, class token",
        "assumed: data.mean, data.std, data.crop_pct, data.interpolation; set those that are wrong",
    ]
    state = json.loads((tmp_path / "alone" / "checkpoints" / "step_00000000" / "state.json").read_text())
    assert state["assumed"][:1] == ["model.num_heads"]


def test_a_classifier_that_pools_otherwise_is_refused_and_other_heads_than_stated_too(tmp_path):
    pooled = timm.create_model("vit_tiny_patch16_224", **SIZES, global_pool="avg", fc_norm=False)
    save_for_hf(pooled, tmp_path / "timm", safe_serialization=True)
    into = ["convert", f"from=timm:{tmp_path / 'timm'}", f"to={tmp_path / 'run'}"]
    assert "pools with global_pool=avg, fc_norm=false; megavit's classifiers read" in refusal(*into)
    assert "num_heads=8, and timm:" in refusal(*into, "num_heads=8")


@pytest.mark.parametrize("shorter", [37, *(pytest.param(side, marks=pytest.mark.slow) for side in (32, 51))])
def test_what_an_export_states_an_import_reads_back(shorter, tmp_path):
    crop = {"size": {"shortest_edge": shorter}, "do_center_crop": True, "crop_size": 32, "resample": 2}
    hf_folder(tmp_path / "hf", {}, {**crop, "image_mean": [0.1, 0.2, 0.3]})
    convert(f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}", "data.std=[0.4,0.5,0.6]")
    want = data_of(tmp_path / "run")
    for kind, place in (("hf", tmp_path / "out"), ("timm", tmp_path / "timm" / "model.safetensors")):
        convert(f"from={tmp_path / 'run'}", f"to={kind}:{place}")
        output = convert(f"from={kind}:{place}", f"to={tmp_path / kind}")
        assert "assumed" not in output
        assert data_of(tmp_path / kind) == want
    stated = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert stated["size"] == {"shortest_edge": shorter}


def data_of(run: Path) -> list:
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    return [data[key] for key in ("image_size", "mean", "std", "crop_pct", "interpolation")]
