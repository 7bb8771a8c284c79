"""Test reading timm's config.json: its settings are used, and an unsupported architecture is rejected by name."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from megavit.checkpoint.convert.external_model import ExternalModel
from megavit.checkpoint.convert.read import read_external
from megavit.data.config import Interpolation
from megavit.errors import ConfigError
from megavit.model.config import Pool

# An unusual number of heads.
SIZES = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=4, num_classes=7)


def save(folder: Path, architecture: str = "vit_tiny_patch16_224", **changed) -> torch.nn.Module:
    model = timm.create_model(architecture, **{**SIZES, **changed}).eval()
    save_for_hf(model, folder, safe_serialization=True)
    return model


def read(folder: Path, *, num_heads: int | None = None) -> ExternalModel:
    return read_external("timm", folder, num_heads=num_heads)


def test_a_folder_of_save_for_hf_states_heads_pooling_and_pixels(tmp_path):
    save(tmp_path, global_pool="avg")
    config = json.loads((tmp_path / "config.json").read_text())
    changed = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.95, "interpolation": "bilinear"}
    config["pretrained_cfg"] |= changed
    config["label_names"] = list("abcdefg")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        external = read(place)
        assert (external.model.num_heads, external.model.norm_eps, external.model.pool) == (4, 1e-6, Pool.mean)
        assert external.classes == list("abcdefg")
        pixels = external.pixels
        assert (pixels.mean, pixels.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert (pixels.crop_pct, pixels.interpolation) == (0.95, Interpolation.bilinear)
        assert external.assumptions() == []
        assert "states: vit_tiny_patch16_224, 4 heads, GELU, eps 1e-6, mean of the patches" in external.notes[0]


def test_what_is_read_is_what_timms_own_transform_does(tmp_path):
    model = save(tmp_path)
    stated = resolve_data_config({"img_size": 32}, model=model)
    resize, crop, _, normalize = create_transform(**stated).transforms
    pixels = read(tmp_path).pixels
    assert (int(32 / pixels.crop_pct), crop.size[0]) == (resize.size, 32)
    assert resize.interpolation.value == pixels.interpolation.value
    assert (normalize.mean.tolist(), normalize.std.tolist()) == (pixels.mean, pixels.std)


def test_an_earlier_form_with_all_keys_in_one_is_read(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    flat = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "mean": [0.1] * 3, "labels": ["a", "b", "c"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    external = read(tmp_path)
    assert (external.pixels.mean, external.classes, external.model.num_heads) == ([0.1] * 3, ["a", "b", "c"], 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"act_layer": "quick_gelu"}, "the activation QuickGELU"),
        ({"act_layer": "gelu_tanh"}, "the activation GELUTanh"),
        ({"norm_layer": "rmsnorm"}, "norms other than LayerNorm"),
        ({"architecture": "vit_base_patch16_rpn_224", "class_token": False}, "layers of ResPostBlock"),
        ({"architecture": "vit_base_patch32_clip_224"}, "a norm before its layers"),
        ({"qkv_bias": False}, "without bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_another_encoder_is_refused_by_its_name(changed, words, tmp_path):
    save(tmp_path, **changed)
    with pytest.raises(ConfigError, match=f"has .*{words}.*, which megavit's network does not support"):
        read(tmp_path)


def test_an_unsupported_pooling_is_found_in_the_config_and_not_in_the_weights(tmp_path):
    save(tmp_path, global_pool="avg", fc_norm=False)
    assert read(tmp_path).other_pooling == "global_pool=avg, fc_norm=false"
    (tmp_path / "config.json").unlink()
    alone = read(tmp_path)
    assert alone.other_pooling is None
    assert alone.assumptions()[0] == "assumed: 2 heads, GELU, eps 1e-6, class token"


@pytest.mark.parametrize("changed", [{"embed_dim": 192}, {"depth": 3}, {"global_pool": "avg"}, {"reg_tokens": 2}])
def test_a_config_of_another_network_is_refused_and_of_another_head_is_not(changed, tmp_path):
    save(tmp_path)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **{**SIZES, **changed}), tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(tmp_path / "config.json")
    with pytest.raises(
        ConfigError, match=r"describes another network than the weights next to it: .* in it and .* in the weights"
    ):
        read(tmp_path)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **{**SIZES, "num_classes": 3}), tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(tmp_path / "config.json")
    assert read(tmp_path).classes == list("0123456")


def test_the_config_states_images_that_are_not_square(tmp_path):
    save(tmp_path, img_size=(32, 48), no_embed_class=True)
    external = read(tmp_path)
    assert external.image_size == [32, 48]
    assert external.weight("pos_embed").shape == (1, 25, 128)
    assert not external.weight("pos_embed")[:, 0].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "vit_of_next_year"}, "does not know architecture=vit_of_next_year"),
        ({"architecture": "hf-hub:some/where"}, "does not know architecture=hf-hub:some/where"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "holds checkpoint_path, which timm's"),
        ({"model_args": {"depth": "many"}}, "timm cannot build architecture=vit_tiny_patch16_224 from it"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode=border with crop_pct=0.875"),
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, "interpolation=lanczos: megavit resizes"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, "has 2 values and the model takes images of 3 channels"),
        ({"model_args": {**SIZES, "img_size": 64}}, "which make 64 patches of 8, and .* has 17 positions"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_config_that_cannot_be_followed_is_refused_in_a_line(changed, message, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_timms_is_left_and_a_torn_one_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "assumed" in read(tmp_path).assumptions()[0]
    (tmp_path / "config.json").write_text('{"architecture": ')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"is a folder without model\.safetensors or"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "sizes", "words"),
    [
        ("deit_tiny_distilled_patch16_224", SIZES, r"a distilled DeiT, with a distillation token.*\(dist_token\)"),
        ("vit_base_patch16_siglip_224", {**SIZES, "num_classes": 0}, r"SigLIP.*\(attn_pool"),
        ("eva_giant_patch14_224", {**SIZES, "mlp_ratio": 2.0}, r"EVA or BEiT.*q_bias"),
        ("vit_giant_patch14_dinov2", {**SIZES, "num_classes": 0}, r"a ViT with a gated MLP \(fc1 makes"),
    ],
)
def test_weights_of_near_relatives_are_called_by_their_name(architecture, sizes, words, tmp_path):
    weights = timm.create_model(architecture, **sizes).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"looks like {words}.* megavit's network is a plain ViT"):
        read(tmp_path)


def test_maes_own_files_are_seen_as_it_sees_images(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SIZES, global_pool="avg")
    torch.save({"model": model.state_dict()}, tmp_path / "ft.pth")
    pixels = read_external("mae", tmp_path / "ft.pth", num_heads=4).pixels
    assert (pixels.mean, pixels.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (pixels.crop_pct, pixels.interpolation, pixels.assumed) == (0.875, Interpolation.bicubic, ())
