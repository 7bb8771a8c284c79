"""Count the FLOPs of a Vision Transformer, without torch.

A multiply-add counts as two. Norms, softmax and element-wise work are not counted, as in every published MFU.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a masked autoencoder's decoder that its FLOPs depend on.

    Attributes:
        hidden: token width.
        ffn: width inside the MLP.
        layers: decoder layers.
        tokens: tokens per image, mask tokens and class tokens included.
    """

    hidden: int
    ffn: int
    layers: int
    tokens: int


@dataclass(frozen=True)
class NetworkShape:
    """The sizes of a network that its FLOPs depend on.

    Attributes:
        hidden: token width.
        ffn: width inside the MLP.
        layers: encoder layers.
        tokens: tokens per image that the encoder sees, class tokens included.
        patches: patches per image that are embedded.
        patch_values: values per patch, patch height · width · channels.
        classes: outputs of the head, 0 without one.
        decoder: sizes of the decoder after the encoder; None for a classifier.
        trains_encoder: false if the full encoder is frozen; frozen single layers are counted as trained.
    """

    hidden: int
    ffn: int
    layers: int
    tokens: int
    patches: int
    patch_values: int
    classes: int
    decoder: DecoderShape | None = None
    trains_encoder: bool = True


def layer_flops(shape: NetworkShape | DecoderShape) -> int:
    """Return the forward FLOPs of one layer for one image: 2N(4h² + 2hf) + 4N²h."""
    n, h, f = shape.tokens, shape.hidden, shape.ffn
    return 2 * n * (4 * h * h + 2 * h * f) + 4 * n * n * h


def embedding_flops(shape: NetworkShape) -> int:
    """Return the forward FLOPs of the patch embedding for one image."""
    return 2 * shape.patches * shape.patch_values * shape.hidden


def head_flops(shape: NetworkShape) -> int:
    """Return the forward FLOPs, for one image, of the linear head or the decoder after the encoder."""
    decoder = shape.decoder
    if decoder is None:
        return 2 * shape.hidden * shape.classes
    entering = 2 * shape.tokens * shape.hidden * decoder.hidden
    leaving = 2 * decoder.tokens * decoder.hidden * shape.patch_values
    return entering + decoder.layers * layer_flops(decoder) + leaving


def forward_flops(shape: NetworkShape) -> int:
    """Return the forward FLOPs of the full model for one image (B/16 with 197 tokens and 1000 classes: 35.1 G)."""
    return shape.layers * layer_flops(shape) + embedding_flops(shape) + head_flops(shape)


def training_flops(shape: NetworkShape) -> int:
    """Return the FLOPs of a training step for one image: three forward passes, minus the gradient of the images.

    A frozen encoder costs one forward pass, and a head on it only the gradient of its weights.
    """
    if not shape.trains_encoder:
        return forward_flops(shape) + head_flops(shape) * (1 if shape.decoder is None else 2)
    return 3 * forward_flops(shape) - embedding_flops(shape)
