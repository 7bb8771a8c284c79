"""Write the JSON files of a Hugging Face folder, and upload the folder to the hub."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.model.config import Head, ModelConfig, Pool


def check_hf_compatible(model: ModelConfig, data: DataConfig, *, is_mae: bool) -> None:
    """Raise ConfigError if Hugging Face's ViT or ViTMAE lacks a part of the model; name the setting."""
    reasons = {
        f"model.class_tokens={model.class_tokens}": model.class_tokens != 1,
        f"model.pool={model.pool.value}": model.pool is not Pool.cls and not is_mae,
        f"model.head={model.head.value}": model.head is not Head.linear and not is_mae,
        "model.patch_bias=false": not model.patch_bias,
        "model.qk_norm=true": model.qk_norm,
        f"model.layer_scale={model.layer_scale}": model.layer_scale is not None,
        f"data.image_size={data.image_size}": is_mae and len(set(data.image_size)) > 1,
    }
    for setting, differs in reasons.items():
        if differs:
            raise ConfigError(
                f"{setting}: Hugging Face's {'ViTMAE' if is_mae else 'ViT'} does not support it; try to=timm:"
            )
    if data.crop_pct is not None and len(set(data.image_size)) > 1:
        raise ConfigError(
            f"data.crop_pct={data.crop_pct} with data.image_size={data.image_size}: Hugging Face's "
            f"processor crops only squares; to=timm: supports it"
        )


def hf_config(
    model: ModelConfig, data: DataConfig, classes: tuple[str, ...], dtype: str, *, decoder: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the content of `config.json`.

    Args:
        model: the run's model group.
        data: the run's data group.
        classes: class names, in the order of the scores; empty for a model without a classifier.
        dtype: fp32, bf16 or fp16.
        decoder: settings of ViTMAE's decoder; None for a classifier.
    """
    size = data.image_size
    settings: dict[str, Any] = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "patch_size": model.patch_size,
        "image_size": size[0] if size[0] == size[1] else size,
        "num_channels": data.channels,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
    }
    if decoder is not None:
        return settings | {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", **decoder}
    if not classes:
        return settings | {"architectures": ["ViTModel"]}
    return settings | {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def hf_preprocessor(data: DataConfig) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`, with the preprocessing of the run's evaluation."""
    full = {"height": data.image_size[0], "width": data.image_size[1]}
    if data.crop_pct is None:
        view = {"size": full, "do_center_crop": False}
    else:
        shorter = math.floor(data.image_size[0] / data.crop_pct)
        view = {"size": {"shortest_edge": shorter}, "do_center_crop": True, "crop_size": full}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": data.channels == 3,
        "do_resize": True,
        **view,
        "resample": 3 if data.interpolation.value == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": data.mean,
        "image_std": data.std,
    }


def model_card(name: str, model: ModelConfig, data: DataConfig, checkpoint: Path) -> str:
    """Return the content of the folder's `README.md`."""
    state = json.loads((checkpoint / "state.json").read_text())
    results = "\n".join(f"- {metric}: {value}" for metric, value in state["metrics"].items()) or "- none"
    return (
        f"---\nlibrary_name: transformers\ntags: [megavit, vit]\n---\n\n# {name}\n\n"
        f"{model.num_layers} layers of {model.hidden_size}, patch {model.patch_size}, trained with megavit for "
        f"{state['step']} steps on {state['consumed_samples']:,} images of `data.source={data.source}`.\n\n"
        f"Validation at that step:\n\n{results}\n"
    )


def push(folder: Path, repository: str) -> None:
    """Upload a folder to the hub; a new repository is private.

    Raises:
        ConfigError: if the hub cannot be reached or rejects the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted by megavit")
    except Exception as error:
        # Without a network the hub's HTTP library raises its own errors, which are not OSErrors.
        known = (OSError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError)
        if not isinstance(error, known) and not type(error).__module__.startswith("httpx"):
            raise
        message = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ConfigError(
            f"push={repository}: the Hugging Face hub rejects it: {message}. {folder} is complete; `hf auth login` "
            f"and `hf upload {repository} {folder}` upload it"
        ) from error
    print(f"https://huggingface.co/{repository}: a new repository is private until you publish it")
