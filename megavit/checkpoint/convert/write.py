"""Write a run's weights as other libraries' files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megavit.checkpoint.convert.hf_mapping import split_prefix, to_hf
from megavit.checkpoint.convert.nemo_mapping import PREFIX, nemo_row
from megavit.checkpoint.convert.timm_config import timm_config
from megavit.checkpoint.param_mapping import Dims
from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Pool, Positions


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file with the user's default file mode."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be written: {error}; free space there, or choose another place") from error
    # safetensors 0.8 renames a temporary file, which only its owner may read.
    path.chmod(mode)


def write_timm(
    path: Path, timm_weights: dict[str, Tensor], model: ModelConfig, data: DataConfig, classes: tuple[str, ...]
) -> None:
    """Write a .safetensors file that `timm.create_model(…, checkpoint_path=…)` reads, and timm's config.json.

    Args:
        path: the file.
        timm_weights: weights by timm's names, including a fixed `pos_embed`; removed from the mapping one by one.
        model: the run's model group.
        data: the run's data group.
        classes: class names, in the order of the scores; empty for a model without a classifier.
    """
    split = split_prefix(
        timm_weights, pools_class_token=model.pool is Pool.cls, learned=model.positions is Positions.learned
    )
    for name in ("cls_token", "pos_embed"):
        timm_weights.pop(name, None)
    weights = {**timm_weights, **split}
    if not model.patch_bias:
        # timm's patch embedding always has a bias.
        weights["patch_embed.proj.bias"] = torch.zeros_like(weights["patch_embed.proj.weight"][:, 0, 0, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, weights, {"format": "pt"})
    settings = timm_config(model, data, classes, weights)
    (path.parent / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_nemo(path: Path, timm_weights: dict[str, Tensor], dims: Dims) -> None:
    """Write one file with a state dict that has NeMo's names.

    Args:
        path: the file.
        timm_weights: weights by timm's names; removed from the mapping one by one.
        dims: sizes of the model.

    Raises:
        ConfigError: for a weight that NeMo's model does not have.
    """
    two_matrices = "pre_logits.0.weight" in timm_weights
    theirs = {}
    for name in list(timm_weights):
        try:
            row, spelled = nemo_row(name, two_matrices=two_matrices)
        except KeyError as error:
            raise ConfigError(f"NeMo's ViT has no weight for {name}; try to=timm:") from error
        theirs[f"{PREFIX}{spelled}"] = row.from_timm(timm_weights.pop(name), dims).contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": theirs}, path)


def write_hf(
    folder: Path, timm_weights: dict[str, Tensor], settings: dict[str, Any], preprocessor: dict[str, Any]
) -> None:
    """Write a folder that `from_pretrained(folder)` reads.

    Args:
        folder: target folder.
        timm_weights: weights by timm's names; removed from the mapping one by one.
        settings: content of config.json.
        preprocessor: content of preprocessor_config.json.

    Raises:
        ConfigError: for a weight that Hugging Face's model does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    theirs: dict[str, Tensor] = {}
    for name in list(timm_weights):
        # Remove each weight as it is converted, so that memory never holds two full copies.
        theirs |= to_hf(name, timm_weights.pop(name))
    write_tensors(folder / "model.safetensors", theirs, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
