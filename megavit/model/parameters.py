"""Tell from a parameter's name the part of the network that the weight belongs to, and its depth.

All names are those in the full model, where encoder layers count from the first pipeline stage (`parameter_names`).
"""

import re

POSITIONS = "embed.pos_embed"
CLASSIFIER_WEIGHT, CLASSIFIER_BIAS = "head.out.weight", "head.out.bias"

_LAYER = re.compile(r"blocks\.layers\.(\d+)\.")
_DECODER, _EMBEDDING = "mae_decoder.", "embed."
_POOLED_NORM, _ENCODER_NORM = "head.fc_norm.", "blocks.final_layernorm."


def is_decoder(name: str) -> bool:
    """Return whether a weight belongs to the decoder of a masked autoencoder."""
    return name.startswith(_DECODER)


def is_last_layer(name: str) -> bool:
    """Return whether a weight belongs to the last linear layer of the classifier."""
    return name.startswith("head.out.")


def is_classifier(name: str) -> bool:
    """Return whether a weight belongs to the classifier behind the pooled, normed features."""
    return is_last_layer(name) or name.startswith("head.pre.")


def is_final_norm(name: str) -> bool:
    """Return whether a weight belongs to the last norm before the classifier."""
    return name.startswith((_POOLED_NORM, _ENCODER_NORM))


def is_encoder(name: str, *, new_parameters: tuple[str, ...]) -> bool:
    """Return whether a weight belongs to the encoder, which includes the norm of its pooled features.

    Args:
        name: the parameter's name in the full model.
        new_parameters: prefixes of the task's parameters behind the encoder.
    """
    return name.startswith(_POOLED_NORM) or not name.startswith(new_parameters)


def may_be_missing(name: str, *, new_parameters: tuple[str, ...]) -> bool:
    """Return whether pretrained weights may lack a weight: one behind the encoder, or of the encoder's last norm.

    Args:
        name: the parameter's name in the full model.
        new_parameters: prefixes of the task's parameters behind the encoder.
    """
    return name.startswith((*new_parameters, _ENCODER_NORM))


def layer_depth(name: str, *, num_layers: int) -> int:
    """Return a weight's depth: 0 for the embedding, i + 1 for layer i (from 0), num_layers + 1 for all that follows.

    Args:
        name: the parameter's name in the full model.
        num_layers: encoder layers of the full model.

    Source: arXiv 2106.08254, section A.3; facebookresearch/mae counts the same way.
    """
    if name.startswith(_EMBEDDING):
        return 0
    layer = _LAYER.match(name)
    return int(layer.group(1)) + 1 if layer else num_layers + 1


def local_layer(name: str) -> int | None:
    """Return the number of an encoder layer within its stage, from 0; None for a weight outside the layers."""
    layer = _LAYER.match(name)
    return int(layer.group(1)) if layer else None


def with_layer(name: str, layer: int) -> str:
    """Return the name of the same weight of another encoder layer, numbered from 0."""
    return _LAYER.sub(f"blocks.layers.{layer}.", name, count=1)
