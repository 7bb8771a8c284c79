"""Models of other libraries on the disk: read into a configuration and weights, written so that theirs open them."""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavit.checkpoint.foreign import (
    HfSpelling,
    NemoSpelling,
    PlainSpelling,
    Spelling,
    join_prefix,
    split_prefix,
    to_hf,
)
from megavit.checkpoint.names import Dims
from megavit.checkpoint.nemo import PREFIX, bare, nemo_row
from megavit.errors import ConfigError
from megavit.model.config import Head, ModelConfig, Pool, Positions
from megavit.model.embedding import sincos_positions

# timm's and Hugging Face's default for ViT.
_MEAN, _STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
# MAE's and NeMo's.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Heads cannot be seen in the weights: width, layers and patch tell the named sizes; others have heads of 64.
_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16}

# What theirs has and the network does not need.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "vit.pooler.dense.weight", "vit.pooler.dense.bias")


class TensorFiles:
    """The tensors of .safetensors, .pth or .bin files, read one by one.

    Args:
        paths: the files.

    Raises:
        ConfigError: if one cannot be read, or holds more than tensors.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._open = ExitStack()
        self._where: dict[str, Any] = {}
        for path in paths:
            try:
                self._add(path)
            except ConfigError:
                raise
            except Exception as error:
                # Of any type: a torn file breaks where it likes.
                told = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ConfigError(f"{path} cannot be read as weights: {told}") from error

    def _add(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self._where |= dict.fromkeys(file.keys(), file)
            return
        # facebookresearch/mae keeps its arguments beside the weights, as a bare Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("model", "state_dict", "model_ema"):
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise ConfigError(f"{path} holds no dictionary of weights")
        self._where |= dict.fromkeys(loaded, loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: if there is none of this name.
        """
        where = self._where[name]
        return where[name] if isinstance(where, dict) else where.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape."""
        where = self._where[name]
        return tuple(where[name].shape if isinstance(where, dict) else where.get_slice(name).get_shape())


@dataclass
class ForeignModel:
    """A model of another library.

    Attributes:
        model: its sizes, as ours.
        image_size: [height, width] in pixels.
        channels: of an image.
        mean, std: per channel.
        classes: names, in the order of the scores; empty of a masked autoencoder or a model without a head.
        assumes: what its files do not tell and was taken as usual, in words.
        decoder: a masked autoencoder's other sizes: settings of the task group.
        weights: by plain name, read when asked for.
        names: the plain names that there are.
    """

    model: ModelConfig
    image_size: list[int]
    channels: int
    classes: list[str]
    files: TensorFiles
    spelling: Spelling
    mean: list[float] = field(default_factory=lambda: list(_MEAN))
    std: list[float] = field(default_factory=lambda: list(_STD))
    assumes: str = ""
    decoder: dict[str, Any] = field(default_factory=dict)

    def assume_normalisation(self) -> None:
        """Take images in [-1, 1], as most of timm's ViTs and Google's take them."""
        self.mean, self.std = [0.5] * self.channels, [0.5] * self.channels
        self.assumes = (
            f"how images were normalised is not told: data.mean={self.mean} and data.std={self.std} are taken, type "
            f"others where they are wrong"
        )

    def weight(self, plain: str) -> Tensor:
        """One weight by its plain name.

        Raises:
            ConfigError: if it is not there.
        """
        try:
            return self.spelling.weight(plain)
        except KeyError as error:
            raise ConfigError(f"the model has no weight {error}, which {plain} is made of") from error

    def unread(self, wanted: list[str]) -> list[str]:
        """Their names that none of the wanted plain ones is made of."""
        fixed = ["decoder_pos_embed"] if self.decoder else []
        if self.model.positions is Positions.sincos:
            fixed.append("pos_embed")
        used = {name for plain in (*wanted, *fixed) for name in self.spelling.names(plain)}
        return sorted(name for name in self.files if name not in used and name not in _UNUSED)


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
        return _read_hf(path)
    if not path.is_file():
        raise ConfigError(f"{path} is no file; weights of {kind} are one file, Hugging Face's folder is from=hf:")
    files = TensorFiles([path])
    return (_read_nemo if kind == "nemo" else _read_plain)(path, files, num_heads=num_heads)


def _read_hf(path: Path) -> ForeignModel:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"from=hf:{path} needs a folder with config.json: {error}") from error
    if config.get("model_type") not in ("vit", "vit_mae"):
        raise ConfigError(f"from=hf:{path} is a {config.get('model_type')}; vit and vit_mae can be converted")
    for key, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(key, needed) != needed:
            raise ConfigError(f"from=hf:{path}: {key}={config[key]}, and megavit's network has {needed}")
    weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not weights:
        raise ConfigError(f"from=hf:{path} has no *.safetensors and no pytorch_model*.bin")
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
        _choose_positions(foreign)
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
        num_heads=num_heads or _usual_heads(width, layers),
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
        foreign.mean, foreign.std, foreign.assumes = list(_IMAGENET_MEAN), list(_IMAGENET_STD), ""
        foreign.classes = []
        _choose_positions(foreign)
    return foreign


def _usual_heads(width: int, layers: int) -> int:
    return _HEADS.get((width, layers), max(1, width // 64))


def _read_nemo(path: Path, files: TensorFiles, *, num_heads: int | None) -> ForeignModel:
    shapes = {bare(name): files.shape(name) for name in files}
    try:
        width, values = shapes["backbone.linear_encoder.weight"]
        tokens = shapes["backbone.cls_token"][1]
        ffn = shapes["backbone.transformer.layers.0.mlp.dense_h_to_4h.weight"][0]
        positions = shapes["backbone.position_embeddings.weight"][0] - tokens
    except KeyError as error:
        raise ConfigError(f"{path} is no ViT of NeMo's names: {error} is missing") from error
    layers = 1 + max(int(name.split(".")[3]) for name in shapes if name.startswith("backbone.transformer.layers."))
    # Its images were of three channels.
    side, patch = math.isqrt(positions), math.isqrt(values // 3)
    if side * side != positions or 3 * patch * patch != values:
        raise ConfigError(
            f"{path} has {positions} positions and {values} values a patch: only square patches of square images in "
            f"three channels are told from weights alone"
        )
    two_matrices = "head.dense_in.weight" in shapes
    model = ModelConfig(
        hidden_size=width,
        ffn_size=ffn,
        num_heads=num_heads or _usual_heads(width, layers),
        num_layers=layers,
        patch_size=patch,
        class_tokens=tokens,
        patch_bias="backbone.linear_encoder.bias" in shapes,
        head=Head.tanh_mlp if two_matrices else Head.linear,
        norm_eps=1e-5,
    )
    spelling = NemoSpelling(files.read, files, Dims(model.num_heads, patch), two_matrices=two_matrices)
    scores = shapes.get("head.dense_out.weight" if two_matrices else "head.weight", (0,))[0]
    foreign = ForeignModel(model, [side * patch] * 2, 3, [str(index) for index in range(scores)], files, spelling)
    foreign.mean, foreign.std = list(_IMAGENET_MEAN), list(_IMAGENET_STD)
    return foreign


def _choose_positions(foreign: ForeignModel) -> None:
    """A masked autoencoder's positions are sine and cosine, or learned; its decoder's must be sine and cosine."""
    grid, tokens = foreign.model.patch_grid(foreign.image_size), foreign.model.class_tokens
    ours = sincos_positions(grid, foreign.model.hidden_size, class_tokens=tokens)
    # Theirs were computed in other precision, in another order.
    if torch.allclose(foreign.weight("pos_embed")[0].float(), ours, atol=1e-5):
        foreign.model.positions = Positions.sincos
    narrow = sincos_positions(grid, foreign.decoder["decoder_hidden_size"], class_tokens=tokens)
    if not torch.allclose(foreign.weight("decoder_pos_embed")[0].float(), narrow, atol=1e-5):
        raise ConfigError(
            "the decoder's positions are no sine and cosine of the patches' places, which ours always are"
        )


def write_timm(path: Path, plain: dict[str, Tensor], model: ModelConfig) -> None:
    """Write one .safetensors file that `timm.create_model(…, checkpoint_path=…)` reads.

    Args:
        path: the file.
        plain: weights of the plain model, `pos_embed` among them also where it is fixed; taken out one by one.
        model: their sizes.
    """
    split = split_prefix(plain, pools_class_token=model.pool is Pool.cls, learned=model.positions is Positions.learned)
    for name in ("cls_token", "pos_embed"):
        plain.pop(name, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**plain, **split}, path, metadata={"format": "pt"})


def write_nemo(path: Path, plain: dict[str, Tensor], dims: Dims) -> None:
    """Write one file with a state dict of NeMo's names.

    Args:
        path: the file.
        plain: weights of the plain model; taken out one by one.
        dims: of the model.

    Raises:
        ConfigError: for a weight that theirs has no place for.
    """
    two_matrices = "pre_logits.0.weight" in plain
    theirs = {}
    for name in list(plain):
        try:
            row, spelled = nemo_row(name, two_matrices=two_matrices)
        except KeyError as error:
            raise ConfigError(f"NeMo's ViT has no place for {name}; to=timm: may have") from error
        theirs[f"{PREFIX}{spelled}"] = row.from_plain(plain.pop(name), dims).contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": theirs}, path)


def write_hf(folder: Path, plain: dict[str, Tensor], settings: dict[str, Any], preprocessor: dict[str, Any]) -> None:
    """Write a folder that `from_pretrained(folder)` reads.

    Args:
        folder: where to.
        plain: weights of the plain model; taken out one by one.
        settings: of config.json.
        preprocessor: of preprocessor_config.json.

    Raises:
        ConfigError: for a weight that theirs has no place for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    theirs: dict[str, Tensor] = {}
    for name in list(plain):
        # Taken out: never are both whole in memory.
        theirs |= to_hf(name, plain.pop(name))
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
