"""Hugging Face's ViTMAEForPreTraining as a reference: convert weights to its names and back, and use the same mask."""

import re
from collections.abc import Iterator

import torch

from megavit.config.experiment import ExperimentConfig

# Name in MAE checkpoints, and Hugging Face's name; `#` is the layer.
LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
WHOLE = {
    "cls_token": "vit.embeddings.cls_token",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}


def _their_names(name: str) -> list[str]:
    """Return Hugging Face's name for a weight, or its three names for a fused qkv."""
    found = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        stem, dot, leaf = name.rpartition(".")
        return [WHOLE[name]] if name in WHOLE else [f"{WHOLE[stem]}{dot}{leaf}"]
    decoder, layer, part, leaf = found.groups()
    place = f"decoder.decoder_layers.{layer}" if decoder else f"vit.layers.{layer}"
    if part == "attn.qkv":
        return [f"{place}.attention.{one}_proj.{leaf}" for one in "qkv"]
    return [f"{place}.{LAYER[part]}.{leaf}"]


def to_theirs(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    theirs: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        names = _their_names(name)
        theirs |= dict(zip(names, weight.chunk(len(names)), strict=True))
    return theirs


def from_theirs(theirs: dict[str, torch.Tensor], names: Iterator[str]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([theirs[one] for one in _their_names(name)]) for name in names}


def build(config: ExperimentConfig, positions: torch.Tensor, decoder_positions: torch.Tensor) -> torch.nn.Module:
    """Build Hugging Face's model of the same sizes, and fill its positions, which transformers 5.23 leaves at zero."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    model, task = config.model, config.task
    settings = ViTMAEConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_attention_heads=model.num_heads,
        num_hidden_layers=model.num_layers,
        patch_size=model.patch_size,
        layer_norm_eps=model.norm_eps,
        image_size=tuple(config.data.image_size),
        num_channels=config.data.channels,
        mask_ratio=task.mask_ratio,
        norm_pix_loss=task.norm_pix_loss,
        decoder_hidden_size=task.decoder_hidden_size,
        decoder_intermediate_size=task.decoder_ffn_size,
        decoder_num_attention_heads=task.decoder_num_heads,
        decoder_num_hidden_layers=task.decoder_num_layers,
    )
    # Hugging Face's decoder fills positions only for square images, and raises for others.
    original = ViTMAEDecoder.initialize_weights
    ViTMAEDecoder.initialize_weights = lambda self, num_patches: None
    try:
        theirs = ViTMAEForPreTraining(settings)
    finally:
        ViTMAEDecoder.initialize_weights = original
    # Hugging Face's model cuts images that are not square into patches only with interpolation.
    theirs.patchify = lambda images, **_: type(theirs).patchify(theirs, images, True)
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings.copy_(positions)
        theirs.decoder.decoder_pos_embed.copy_(decoder_positions)
    return theirs


def noise_for(keep: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Return noise whose sort keeps these patches, in this order."""
    noise = torch.arange(num_patches).float().repeat(len(keep), 1) + num_patches
    return noise.scatter(1, keep, torch.arange(keep.shape[1]).float().repeat(len(keep), 1))
