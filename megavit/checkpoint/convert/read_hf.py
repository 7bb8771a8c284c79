"""Read a Hugging Face folder: config.json, weights, preprocessor."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.external_model import ExternalModel, choose_positions
from megavit.checkpoint.convert.hf_mapping import HfMapping
from megavit.checkpoint.convert.hf_processor import read_processor
from megavit.checkpoint.convert.json_files import height_width, positive, read_object, square_patch
from megavit.checkpoint.convert.tensor_files import TensorFiles
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig

# transformers' defaults for settings that a config.json does not state.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "decoder_num_attention_heads": 16,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_intermediate_size": 2048,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}


def read_hf(path: Path, *, typed: Collection[str]) -> ExternalModel:
    """Read a Hugging Face model (see `read_external`)."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"hf:{path} needs a folder with config.json")
    config = _DEFAULTS | read_object(path / "config.json")
    _refuse_other_models(path, config)
    weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not weights:
        raise ConfigError(f"hf:{path} has no *.safetensors and no pytorch_model*.bin")
    files = TensorFiles(weights)
    name = f"{path / 'config.json'}: "

    def size(key: str) -> int:
        return positive(config[key], name + key)

    eps = config["layer_norm_eps"]
    if not isinstance(eps, int | float):
        raise ConfigError(f"{name}layer_norm_eps={eps!r} must be a number")
    image_size, channels = list(height_width(config["image_size"], f"{name}image_size")), size("num_channels")
    pixels, notes = read_processor(path, image_size=image_size, channels=channels, typed=typed)
    external = ExternalModel(
        ModelConfig(
            hidden_size=size("hidden_size"),
            ffn_size=size("intermediate_size"),
            num_heads=size("num_attention_heads"),
            num_layers=size("num_hidden_layers"),
            patch_size=square_patch(config["patch_size"], f"{name}patch_size"),
            norm_eps=float(eps),
        ),
        image_size,
        channels,
        [],
        files,
        HfMapping(files.read, files),
        pixels,
        notes=notes,
    )
    if config["model_type"] == "vit_mae":
        external.decoder = {
            "decoder_hidden_size": size("decoder_hidden_size"),
            "decoder_ffn_size": size("decoder_intermediate_size"),
            "decoder_num_heads": size("decoder_num_attention_heads"),
            "decoder_num_layers": size("decoder_num_hidden_layers"),
            "mask_ratio": config["mask_ratio"],
            "norm_pix_loss": config["norm_pix_loss"],
        }
        choose_positions(external)
    elif "classifier.weight" in files:
        external.classes = _class_names(config.get("id2label"), files.shape("classifier.weight")[0])
    return external


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind is None and "architecture" in config:
        raise ConfigError(f"hf:{path} is a timm folder ({config['architecture']}); use timm:{path}")
    if kind is None:
        raise ConfigError(f"hf:{path}: config.json states no model_type; vit and vit_mae can be converted")
    if kind not in ("vit", "vit_mae"):
        raise ConfigError(f"hf:{path} is a {kind}; vit and vit_mae can be converted")
    for key, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config[key] != needed:
            raise ConfigError(f"hf:{path}: {key}={config[key]}, and megavit's network has {needed}")


def _class_names(id2label: Any, count: int) -> list[str]:
    """Return class names in the order of the scores; numbers instead of transformers' LABEL_0, LABEL_1, …"""
    labels = {str(key): str(label) for key, label in id2label.items()} if isinstance(id2label, dict) else {}
    names = [labels.get(str(index), str(index)) for index in range(count)]
    filled_in = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return [str(index) for index in range(count)] if filled_in else names
