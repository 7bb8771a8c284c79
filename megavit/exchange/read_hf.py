"""Hugging Face's folder: config.json, weights, preprocessor."""

import json
from pathlib import Path

from megavit.checkpoint.foreign import HfSpelling
from megavit.errors import ConfigError
from megavit.exchange.foreign_model import ForeignModel
from megavit.exchange.positions import choose_positions
from megavit.exchange.tensor_files import TensorFiles
from megavit.model.config import ModelConfig


def read_hf(path: Path) -> ForeignModel:
    """See `read_foreign`."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"hf:{path} needs a folder with config.json: {error}") from error
    if config.get("model_type") not in ("vit", "vit_mae"):
        raise ConfigError(f"hf:{path} is a {config.get('model_type')}; vit and vit_mae can be converted")
    for key, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(key, needed) != needed:
            raise ConfigError(f"hf:{path}: {key}={config[key]}, and megavit's network has {needed}")
    weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not weights:
        raise ConfigError(f"hf:{path} has no *.safetensors and no pytorch_model*.bin")
    files = TensorFiles(weights)
    spelling = HfSpelling(files.read, files)
    size = config.get("image_size", 224)
    image_size = list(size) if isinstance(size, list | tuple) else [size, size]
    foreign = ForeignModel(
        ModelConfig(
            hidden_size=config["hidden_size"],
            ffn_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_layers=config["num_hidden_layers"],
            patch_size=config["patch_size"],
            norm_eps=config.get("layer_norm_eps", 1e-12),
        ),
        image_size,
        config.get("num_channels", 3),
        [],
        files,
        spelling,
    )
    if config["model_type"] == "vit_mae":
        foreign.decoder = {
            "decoder_hidden_size": config["decoder_hidden_size"],
            "decoder_ffn_size": config["decoder_intermediate_size"],
            "decoder_num_heads": config["decoder_num_attention_heads"],
            "decoder_num_layers": config["decoder_num_hidden_layers"],
            "mask_ratio": config.get("mask_ratio", 0.75),
            "norm_pix": config.get("norm_pix_loss", False),
        }
        choose_positions(foreign)
    elif "classifier.weight" in files:
        count = files.shape("classifier.weight")[0]
        labels = {int(key): str(name) for key, name in config.get("id2label", {}).items()}
        foreign.classes = [labels.get(index, str(index)) for index in range(count)]
    _read_preprocessor(path, foreign)
    return foreign


def _read_preprocessor(path: Path, foreign: ForeignModel) -> None:
    file = path / "preprocessor_config.json"
    if file.is_file():
        settings = json.loads(file.read_text())
        foreign.mean = list(settings.get("image_mean") or foreign.mean)
        foreign.std = list(settings.get("image_std") or foreign.std)
    else:
        foreign.assume_normalisation()
