"""Weights of another library read into a configuration and tensors."""

import math
from pathlib import Path

from megavit.checkpoint.foreign import PlainSpelling, join_prefix
from megavit.errors import ConfigError
from megavit.exchange.foreign_model import IMAGENET_MEAN, IMAGENET_STD, ForeignModel, usual_heads
from megavit.exchange.positions import choose_positions
from megavit.exchange.read_hf import read_hf
from megavit.exchange.read_nemo import read_nemo
from megavit.exchange.tensor_files import TensorFiles
from megavit.model.config import ModelConfig, Pool

# Other libraries' forms, as a user writes them before the colon.
KINDS = ("hf", "timm", "mae", "nemo")
_HUB_FILES = ["*.json", "*.safetensors"]


def read_foreign(kind: str, path: Path, *, num_heads: int | None) -> ForeignModel:
    """Read a model of another library.

    Args:
        kind: `timm` (one file of weights), `mae` (facebookresearch/mae's .pth), `hf` (a folder with config.json) or
            `nemo` (one file with a state dict).
        path: the file or folder.
        num_heads: where weights alone do not tell; None for those of the named sizes, else heads of 64.

    Raises:
        ConfigError: if it cannot be read, or is no ViT that this network can be.
    """
    if kind == "hf":
        return read_hf(path)
    if not path.is_file():
        raise ConfigError(f"{path} is no file; weights of {kind} are one file, Hugging Face's folder is hf:FOLDER")
    files = TensorFiles([path])
    return (read_nemo if kind == "nemo" else _read_plain)(path, files, num_heads=num_heads)


def _read_plain(path: Path, files: TensorFiles, *, num_heads: int | None) -> ForeignModel:
    try:
        width, channels, patch, _ = files.shape("patch_embed.proj.weight")
        ffn = files.shape("blocks.0.mlp.fc1.weight")[0]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} is no ViT of timm's names: {error} is missing") from error
    layers = 1 + max(int(name.split(".")[1]) for name in files if name.startswith("blocks."))
    prefix = sum(files.shape(name)[1] for name in ("cls_token", "reg_token") if name in files)
    joined = join_prefix(files.read, files)
    if "pos_embed" not in joined:
        raise ConfigError(f"{path} has no pos_embed: megavit's network adds positions to its tokens")
    side = math.isqrt(joined["pos_embed"].shape[1] - prefix)
    if side * side + prefix != joined["pos_embed"].shape[1]:
        raise ConfigError(
            f"{path} has {joined['pos_embed'].shape[1]} positions, less {prefix} class tokens no square: only square "
            f"images are told from weights alone"
        )
    scale = files.read("blocks.0.ls1.gamma") if "blocks.0.ls1.gamma" in files else None
    model = ModelConfig(
        hidden_size=width,
        ffn_size=ffn,
        num_heads=num_heads or usual_heads(width, layers),
        num_layers=layers,
        patch_size=patch,
        class_tokens=prefix,
        pool=Pool.mean if "fc_norm.weight" in files or not prefix else Pool.cls,
        patch_bias="patch_embed.proj.bias" in files,
        qk_norm="blocks.0.attn.q_norm.weight" in files,
        layer_scale=float(scale.flatten()[0].abs().clamp(min=1e-12)) if scale is not None else None,
    )
    classes = [str(index) for index in range(files.shape("head.weight")[0])] if "head.weight" in files else []
    foreign = ForeignModel(model, [side * patch] * 2, channels, classes, files, PlainSpelling(files.read, files))
    foreign.assume_normalisation()
    if "decoder_embed.weight" in files:
        narrow = files.shape("decoder_embed.weight")[0]
        deep = 1 + max(int(name.split(".")[1]) for name in files if name.startswith("decoder_blocks."))
        foreign.decoder = {
            "decoder_hidden_size": narrow,
            "decoder_ffn_size": files.shape("decoder_blocks.0.mlp.fc1.weight")[0],
            # Published decoders have 16 heads of 32.
            "decoder_num_heads": 16 if narrow % 16 == 0 else max(1, narrow // 32),
            "decoder_num_layers": deep,
            "mask_ratio": 0.75,
            "norm_pix": True,
        }
        foreign.mean, foreign.std, foreign.assumes = list(IMAGENET_MEAN), list(IMAGENET_STD), ""
        foreign.classes = []
        choose_positions(foreign)
    return foreign


def fetch(kind: str, place: str, *, setting: str) -> Path:
    """The file or folder of a model, brought from the Hugging Face hub where its place is no path but an id.

    Args:
        kind: as `read_foreign` takes it.
        place: a path, or ORG/NAME.
        setting: that named it, for the error.

    Raises:
        ConfigError: if it is neither here nor there.
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
            f"{setting}={kind}:{place} is no path here, and the Hugging Face hub does not give it: "
            f"{str(error).splitlines()[0]}. Without a network, copy its files here and name the path"
        ) from error
    return folder if kind == "hf" else folder / "model.safetensors"
