"""Read timm's `config.json` by building its network with timm.

The network is built on torch's meta device, without memory. It shows the activation, norms, pooling and heads, from
the architecture's defaults or from `model_args`.
"""

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavit.checkpoint.convert.json_files import height_width, numbers, read_object
from megavit.checkpoint.convert.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from megavit.checkpoint.convert.tensor_files import TensorFiles
from megavit.data.config import Interpolation
from megavit.errors import ConfigError

_FILE = "config.json"
# File names in timm's search order, followed by the names that training scripts write.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

# Positions and classifier may differ: resolution and number of classes do not make another network.
_MAY_DIFFER = ("pos_embed", "head.")


@dataclass
class TimmConfig:
    """The content of a `config.json`.

    Attributes:
        file: path of the config.json.
        architecture: timm's name of the network.
        num_heads, norm_eps, image_size: sizes of the network.
        other_encoder: difference of the encoder from megavit's; None if there is none.
        other_pooling: the classifier's pooling if megavit's head does not support it; else None.
        shapes: shapes of the weights by name, without positions and classifier.
        classes: class names, in the order of the scores; empty if the file has none.
        pretrained_cfg: the file's preprocessing settings.
    """

    file: Path
    architecture: str
    num_heads: int
    norm_eps: float
    image_size: list[int]
    other_encoder: str | None
    other_pooling: str | None
    shapes: dict[str, tuple[int, ...]]
    classes: list[str]
    pretrained_cfg: dict[str, Any]

    def refuse_other_weights(self, files: TensorFiles) -> None:
        """Raise ConfigError if the weights do not belong to this network; name the first difference."""
        there = {name: files.shape(name) for name in files if not name.startswith(_MAY_DIFFER)}
        for name in sorted(there.keys() | self.shapes.keys()):
            stated, found = self.shapes.get(name), there.get(name)
            if stated != found:
                words = [list(shape) if shape is not None else "missing" for shape in (stated, found)]
                raise ConfigError(
                    f"{self.file} describes another network than the weights next to it: {name} is {words[0]} in it "
                    f"and {words[1]} in the weights; correct it, or remove it and let megavit assume what it states"
                )

    def pixels(self, channels: int, *, typed: Collection[str]) -> Pixels:
        """Return the preprocessing of `timm.data.create_transform` for this network.

        Args:
            channels: channels of an image.
            typed: data settings given by the user, which are not read from the file.

        Raises:
            ConfigError: if megavit cannot produce the same pixels.
        """
        stated, name = self.pretrained_cfg, f"{self.file}: "
        pixels = Pixels([0.5] * channels, [0.5] * channels, None)
        if "data.mean" not in typed:
            pixels.mean = numbers(stated.get("mean", IMAGENET_MEAN), channels, f"{name}mean")
        if "data.std" not in typed:
            pixels.std = numbers(stated.get("std", IMAGENET_STD), channels, f"{name}std")
        if "data.interpolation" not in typed:
            resizing = stated.get("interpolation", "bicubic")
            if resizing not in {choice.value for choice in Interpolation}:
                raise ConfigError(
                    f"{name}interpolation={resizing}: megavit resizes bilinear or bicubic; set one: "
                    f"data.interpolation=bicubic, for example"
                )
            pixels.interpolation = Interpolation(resizing)
        if "data.crop_pct" not in typed:
            pixels.crop_pct = self._eval_crop()
        return pixels

    def _eval_crop(self) -> float | None:
        share, mode = self.pretrained_cfg.get("crop_pct", 0.875), self.pretrained_cfg.get("crop_mode", "center")
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"{self.file}: crop_pct={share} must be above 0 and at most 1; set data.crop_pct=…")
        if mode == "center":
            return float(share)
        if mode == "squash" and share == 1:
            return None
        raise ConfigError(
            f"{self.file}: crop_mode={mode} with crop_pct={share}: megavit resizes the full image, or its shorter side "
            f"with a centre crop; set one: data.crop_pct=null, or data.crop_pct={share}"
        )


def find_weights_file(folder: Path) -> Path:
    """Return the file of weights in a folder that timm's `save_for_hf` wrote.

    Raises:
        ConfigError: if there is none.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"timm:{folder} is a folder without {' or '.join(_WEIGHTS)}; give the file of weights")


def read_timm_config(weights: Path) -> TimmConfig | None:
    """Read the `config.json` next to a file of weights; return None if there is none, or it is not timm's.

    Raises:
        ConfigError: if the file cannot be read, or timm cannot build its network.
    """
    file = weights.parent / _FILE
    if not file.is_file():
        return None
    config = read_object(file)
    if not isinstance(config.get("architecture"), str):
        return None
    # timm's earlier format has all keys in one object.
    pretrained = config.get("pretrained_cfg", config)
    arguments, count = config.get("model_args", {}), config.get("num_classes", pretrained.get("num_classes", 1000))
    if not isinstance(pretrained, dict) or not isinstance(arguments, dict):
        raise ConfigError(f"{file}: pretrained_cfg and model_args must be JSON objects")
    names = config.get("label_names", pretrained.get("label_names", pretrained.get("labels")))
    network = _build(file, config["architecture"], {"num_classes": count, **arguments})
    other = _other_encoder(network)
    blocks = getattr(network, "blocks", None)
    eps = sorted({module.eps for module in network.modules() if isinstance(module, torch.nn.LayerNorm)})
    if other is None and len(eps) != 1:
        other = f"LayerNorms of several epsilons, {eps}"
    size = arguments.get("img_size") or list(pretrained.get("input_size", (3, 224, 224)))[1:]
    return TimmConfig(
        file,
        config["architecture"],
        num_heads=blocks[0].attn.num_heads if other is None and blocks is not None else 1,
        norm_eps=eps[0] if eps else 1e-6,
        image_size=list(height_width(size, f"{file}: img_size")),
        other_encoder=other,
        other_pooling=_other_pooling(network) if other is None else None,
        shapes={
            name: tuple(weight.shape)
            for name, weight in network.state_dict().items()
            if not name.startswith(_MAY_DIFFER)
        },
        classes=[str(name) for name in names] if isinstance(names, list) and len(names) == count else [],
        pretrained_cfg=pretrained,
    )


def _build(file: Path, architecture: str, arguments: dict[str, Any]) -> torch.nn.Module:
    import timm
    from timm.models import VisionTransformer

    name = architecture.partition(".")[0]
    if not timm.is_model(name):
        raise ConfigError(
            f"{file}: timm {timm.__version__} does not know architecture={architecture}; upgrade timm, or remove "
            f"config.json and let megavit assume what it states"
        )
    # Accept only arguments that define a network, and none that makes timm open another file.
    known = inspect.signature(VisionTransformer).parameters
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ConfigError(f"{file}: model_args holds {unknown[0]}, which timm's VisionTransformer does not accept")
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:
        # timm's constructors raise various types for wrong arguments.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{file}: timm cannot build architecture={architecture} from it: {reason}") from error


def _other_encoder(network: Any) -> str | None:
    """Describe the first difference of an encoder from megavit's, except sizes; return None if there is none."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models import VisionTransformer
    from timm.models.vision_transformer import Block

    if type(network) is not VisionTransformer:
        return f"a {type(network).__name__}"
    block = network.blocks[0]
    if type(block) is not Block:
        return f"layers of {type(block).__name__}"
    activation = block.mlp.act if type(block.mlp) is Mlp else None
    norms = {type(module) for module in network.modules() if "Norm" in type(module).__name__}
    for differs, words in (
        (type(network.patch_embed) is not PatchEmbed, f"patches by {type(network.patch_embed).__name__}"),
        (type(block.attn) is not Attention, f"attention by {type(block.attn).__name__}"),
        (type(block.mlp) is not Mlp, f"an MLP by {type(block.mlp).__name__}"),
        (not _is_gelu(activation), f"the activation {type(activation).__name__}"),
        (not all(issubclass(norm, torch.nn.LayerNorm) for norm in norms), "norms other than LayerNorm"),
        (not isinstance(network.norm_pre, torch.nn.Identity), "a norm before its layers (pre_norm)"),
        (
            type(block.attn) is Attention and block.attn.qkv.bias is None,
            "queries, keys and values without bias (qkv_bias=false)",
        ),
    ):
        if differs:
            return words
    return None


def _is_gelu(activation: Any) -> bool:
    return type(activation).__name__ == "GELU" and getattr(activation, "approximate", "none") == "none"


def _other_pooling(network: Any) -> str | None:
    """Describe a classifier's pooling if megavit's head does not support it; else return None."""
    pool, norms_after = network.global_pool, not isinstance(network.fc_norm, torch.nn.Identity)
    settings = f"global_pool={pool}, fc_norm={str(norms_after).lower()}"
    if pool == "token" and network.has_class_token and not norms_after:
        return None
    if pool == "avg" and norms_after and not network.pool_include_prefix:
        return None
    if pool == "avg" and network.pool_include_prefix:
        settings += ", pool_include_prefix=true"
    return settings
