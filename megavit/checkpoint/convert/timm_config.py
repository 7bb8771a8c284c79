"""Write timm's `config.json`, from which `timm.create_model` and `timm.data.create_transform` work."""

import math
from typing import Any

from torch import Tensor

from megavit.data.config import DataConfig
from megavit.model.config import ModelConfig

# (width, layers, heads): timm's name, and its patch sizes. For all other sizes, `vit_base_patch16_224` gets them as
# arguments.
_NAMES = {
    (192, 12, 3): ("tiny", (16,)),
    (384, 12, 6): ("small", (8, 16, 32)),
    (768, 12, 12): ("base", (8, 16, 32)),
    (1024, 24, 16): ("large", (14, 16, 32)),
    (1280, 32, 16): ("huge", (14,)),
    (1408, 40, 16): ("giant", (14,)),
    (1664, 48, 16): ("gigantic", (14,)),
}
# Epsilon of timm's LayerNorms, which config.json cannot set.
TIMM_NORM_EPS = 1e-6


def timm_config(
    model: ModelConfig, data: DataConfig, classes: tuple[str, ...], weights: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the content of `config.json`: the network, and the preprocessing of the run's evaluation.

    Args:
        model: the run's model group.
        data: the run's data group.
        classes: class names, in the order of the scores; empty for a model without a classifier.
        weights: weights of the file, by timm's names.
    """
    size = data.image_size
    patches = size[0] // model.patch_size * (size[1] // model.patch_size)
    has_token, has_fc_norm = "cls_token" in weights, "fc_norm.weight" in weights
    global_pool = "token" if has_token and not has_fc_norm else "avg"
    arguments = {
        "img_size": size[0] if size[0] == size[1] else size,
        "patch_size": model.patch_size,
        "in_chans": data.channels,
        "embed_dim": model.hidden_size,
        "depth": model.num_layers,
        "num_heads": model.num_heads,
        "mlp_ratio": _mlp_ratio(model.hidden_size, model.ffn_size),
        "global_pool": global_pool,
        "fc_norm": has_fc_norm,
        "class_token": has_token,
        "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "no_embed_class": weights["pos_embed"].shape[1] == patches,
        "qk_norm": model.qk_norm,
        "init_values": model.layer_scale,
    }
    squash = data.crop_pct is None
    return {
        "architecture": _name(model),
        "num_classes": len(classes),
        "num_features": model.hidden_size,
        "global_pool": global_pool,
        "model_args": arguments,
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [data.channels, *size],
            "fixed_input_size": True,
            "interpolation": data.interpolation.value,
            "crop_pct": 1.0 if squash else data.crop_pct,
            "crop_mode": "squash" if squash else "center",
            "mean": data.mean,
            "std": data.std,
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _name(model: ModelConfig) -> str:
    name, patches = _NAMES.get((model.hidden_size, model.num_layers, model.num_heads), ("", ()))
    return f"vit_{name}_patch{model.patch_size}_224" if model.patch_size in patches else "vit_base_patch16_224"


def _mlp_ratio(hidden: int, ffn: int) -> float:
    """Return a ratio for which timm's `int(hidden * ratio)` gives the MLP's width."""
    ratio = ffn / hidden
    return ratio if int(hidden * ratio) == ffn else math.nextafter(ratio, math.inf)
