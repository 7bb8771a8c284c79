"""Read NVIDIA NeMo's state dict and compute the model's sizes from its shapes."""

import math
from pathlib import Path

from megavit.checkpoint.convert.external_model import ExternalModel, usual_heads
from megavit.checkpoint.convert.hf_mapping import NemoMapping
from megavit.checkpoint.convert.nemo_mapping import bare
from megavit.checkpoint.convert.pixels import imagenet_pixels
from megavit.checkpoint.convert.tensor_files import TensorFiles
from megavit.checkpoint.param_mapping import Dims
from megavit.errors import ConfigError
from megavit.model.config import Head, ModelConfig


def read_nemo(path: Path, files: TensorFiles, *, num_heads: int | None) -> ExternalModel:
    """Read a NeMo model (see `read_external`)."""
    shapes = {bare(name): files.shape(name) for name in files}
    try:
        width, values = shapes["backbone.linear_encoder.weight"]
        tokens = shapes["backbone.cls_token"][1]
        ffn = shapes["backbone.transformer.layers.0.mlp.dense_h_to_4h.weight"][0]
        positions = shapes["backbone.position_embeddings.weight"][0] - tokens
    except KeyError as error:
        raise ConfigError(f"{path} is not a ViT with NeMo's names: {error} is missing") from error
    layers = 1 + max(int(name.split(".")[3]) for name in shapes if name.startswith("backbone.transformer.layers."))
    # NeMo's ViT takes three channels.
    side, patch = math.isqrt(positions), math.isqrt(values // 3)
    if side * side != positions or 3 * patch * patch != values:
        raise ConfigError(
            f"{path} has {positions} positions and {values} values a patch: sizes follow from weights only for square "
            f"patches of square images with three channels"
        )
    two_matrices = "head.dense_in.weight" in shapes
    model = ModelConfig(
        hidden_size=width,
        ffn_size=ffn,
        num_heads=num_heads or usual_heads(width, layers),
        num_layers=layers,
        patch_size=patch,
        class_tokens=tokens,
        patch_bias="backbone.linear_encoder.bias" in shapes,
        head=Head.tanh_mlp if two_matrices else Head.linear,
        norm_eps=1e-5,
    )
    mapping = NemoMapping(files.read, files, Dims(model.num_heads, patch), two_matrices=two_matrices)
    scores = shapes.get("head.dense_out.weight" if two_matrices else "head.weight", (0,))[0]
    return ExternalModel(
        model,
        [side * patch] * 2,
        3,
        [str(index) for index in range(scores)],
        files,
        mapping,
        imagenet_pixels(3, crop_pct=None),
        assumed={"model.num_heads": f"{model.num_heads} heads"},
    )
