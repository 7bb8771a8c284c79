"""Read a model of another library into a configuration and tensors."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.external_model import ExternalModel, choose_positions, network_words, usual_heads
from megavit.checkpoint.convert.hf_mapping import TimmMapping
from megavit.checkpoint.convert.other_architectures import refuse_other_architectures
from megavit.checkpoint.convert.pixels import assumed_pixels, imagenet_pixels
from megavit.checkpoint.convert.read_hf import read_hf
from megavit.checkpoint.convert.read_nemo import read_nemo
from megavit.checkpoint.convert.read_timm import TimmConfig, find_weights_file, read_timm_config
from megavit.checkpoint.convert.tensor_files import TensorFiles
from megavit.data.config import Interpolation
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Pool

# The formats of other libraries; a user writes them before the colon.
KINDS = ("hf", "timm", "mae", "nemo")
_HUB_FILES = ["*.json", "*.safetensors"]


def read_external(kind: str, path: Path, *, num_heads: int | None, typed: Collection[str] = ()) -> ExternalModel:
    """Read a model of another library.

    Args:
        kind: `timm` (a file of weights, or a folder with one, optionally with timm's config.json), `mae`
            (facebookresearch/mae's .pth), `hf` (a folder with config.json) or `nemo` (one file with a state dict).
        path: the file or folder.
        num_heads: number of heads if the files do not state it; None for the usual number (see `usual_heads`).
        typed: data settings given by the user, which are not read from the files.

    Raises:
        ConfigError: if the model cannot be read, or is not a ViT that megavit supports.
    """
    if kind == "hf":
        return read_hf(path, typed=typed)
    if kind == "timm" and path.is_dir():
        path = find_weights_file(path)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; {kind}: needs one file, and a Hugging Face folder is hf:FOLDER")
    files = TensorFiles([path])
    if kind == "nemo":
        return read_nemo(path, files, num_heads=num_heads)
    stated = read_timm_config(path) if kind == "timm" else None
    external = _read_plain(path, files, num_heads=num_heads, stated=stated)
    if external.decoder or kind == "mae":
        # facebookresearch/mae, util/datasets.py, does not crop images larger than 224.
        crop = 0.875 if max(external.image_size) <= 224 else 1.0
        external.pixels = imagenet_pixels(external.channels, crop_pct=crop)
    elif stated is not None:
        external.pixels = stated.pixels(external.channels, typed=typed)
    return external


def _read_plain(path: Path, files: TensorFiles, *, num_heads: int | None, stated: TimmConfig | None) -> ExternalModel:
    if stated is not None and stated.other_encoder is not None:
        raise ConfigError(
            f"{stated.file}: architecture={stated.architecture} has {stated.other_encoder}, which megavit's network "
            f"does not support"
        )
    refuse_other_architectures(str(path), files)
    if stated is not None:
        stated.refuse_other_weights(files)
    try:
        width, channels, patch, across = files.shape("patch_embed.proj.weight")
        ffn = files.shape("blocks.0.mlp.fc1.weight")[0]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not a ViT with timm's names: {error} is missing") from error
    if patch != across:
        raise ConfigError(f"{path} has patches of {patch} × {across}: megavit's are square")
    layers = 1 + max(int(name.split(".")[1]) for name in files if name.startswith("blocks."))
    prefix = sum(files.shape(name)[1] for name in ("cls_token", "reg_token") if name in files)
    if "pos_embed" not in files:
        raise ConfigError(f"{path} has no pos_embed: megavit's network adds positions to its tokens")
    image_size = _image_size(path, files.shape("pos_embed")[1], prefix=prefix, patch=patch, stated=stated)
    num_patches = image_size[0] // patch * (image_size[1] // patch)
    scale = files.read("blocks.0.ls1.gamma") if "blocks.0.ls1.gamma" in files else None
    model = ModelConfig(
        hidden_size=width,
        ffn_size=ffn,
        num_heads=stated.num_heads if stated is not None else num_heads or usual_heads(width, layers),
        num_layers=layers,
        patch_size=patch,
        class_tokens=prefix,
        pool=Pool.mean if "fc_norm.weight" in files or not prefix else Pool.cls,
        patch_bias="patch_embed.proj.bias" in files,
        qk_norm="blocks.0.attn.q_norm.weight" in files,
        layer_scale=float(scale.flatten()[0].abs().clamp(min=1e-12)) if scale is not None else None,
        norm_eps=stated.norm_eps if stated is not None else 1e-6,
    )
    external = ExternalModel(
        model,
        image_size,
        channels,
        _class_names(path, files, stated),
        files,
        TimmMapping(files.read, files, num_patches=num_patches),
        assumed_pixels(channels, crop_pct=0.9, interpolation=Interpolation.bicubic),
    )
    if stated is not None:
        words = ", ".join(network_words(model).values())
        external.notes.append(f"{stated.file} states: {stated.architecture}, {words}")
        external.other_pooling = stated.other_pooling
    else:
        external.assumed = network_words(model)
        if "fc_norm.weight" in files or "decoder_embed.weight" in files:
            del external.assumed["model.pool"]
        if not prefix and "fc_norm.weight" not in files:
            external.other_pooling = "no class token and no fc_norm"
    if "decoder_embed.weight" in files:
        external.decoder, external.classes = _decoder(files), []
        external.assumed["task.decoder_num_heads"] = f"{external.decoder['decoder_num_heads']} heads in the decoder"
        choose_positions(external)
    return external


def _image_size(path: Path, positions: int, *, prefix: int, patch: int, stated: TimmConfig | None) -> list[int]:
    """Return the image size for the positions: the stated one, or a square with or without class tokens."""
    if stated is not None:
        height, width = stated.image_size
        patches = height // patch * (width // patch)
        if positions not in (patches, patches + prefix):
            raise ConfigError(
                f"{stated.file} states images of {stated.image_size}, which make {patches} patches of {patch}, and "
                f"{path} has {positions} positions"
            )
        return stated.image_size
    for patches in (positions, positions - prefix):
        side = math.isqrt(patches)
        if side * side == patches:
            return [side * patch] * 2
    raise ConfigError(
        f"{path} has {positions} positions, which minus {prefix} class tokens are not a square: the image size follows "
        f"from weights only for square images"
    )


def _class_names(path: Path, files: TensorFiles, stated: TimmConfig | None) -> list[str]:
    if "head.weight" not in files:
        return []
    count = files.shape("head.weight")[0]
    if stated is None or not stated.classes:
        return [str(index) for index in range(count)]
    if len(stated.classes) != count:
        raise ConfigError(f"{stated.file} names {len(stated.classes)} classes, and the head of {path} scores {count}")
    return stated.classes


def _decoder(files: TensorFiles) -> dict[str, Any]:
    narrow = files.shape("decoder_embed.weight")[0]
    return {
        "decoder_hidden_size": narrow,
        "decoder_ffn_size": files.shape("decoder_blocks.0.mlp.fc1.weight")[0],
        # Published decoders have 16 heads of 32.
        "decoder_num_heads": 16 if narrow % 16 == 0 else max(1, narrow // 32),
        "decoder_num_layers": 1 + max(int(name.split(".")[1]) for name in files if name.startswith("decoder_blocks.")),
        "mask_ratio": 0.75,
        "norm_pix_loss": True,
    }


def fetch(kind: str, place: str, *, setting: str) -> Path:
    """Return the file or folder of a model; an id is downloaded from the Hugging Face hub.

    Args:
        kind: format of the files (see `read_external`).
        place: a path, or ORG/NAME.
        setting: name of the setting that holds `place`, for the error.

    Raises:
        ConfigError: if the model is neither a path nor on the hub.
    """
    path = Path(place)
    if path.exists() or kind in ("mae", "nemo") or place.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(place, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"{setting}={kind}:{place} is not a path here, and the Hugging Face hub does not provide it: "
            f"{str(error).splitlines()[0]}. Without a network, copy its files here and name the path"
        ) from error
    return folder
