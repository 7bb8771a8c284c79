"""Recognise architectures that resemble a plain Vision Transformer by the names of their weights."""

import re

from megavit.checkpoint.convert.tensor_files import TensorFiles
from megavit.errors import ConfigError

# A weight name that only this architecture has, and a description of it.
_SIGNS = (
    (r"dist_token", "a distilled DeiT, with a distillation token and two heads"),
    (r"attn_pool\..*", "SigLIP's ViT or another that pools by attention"),
    (r"blocks\.0\.attn\.(q_bias|v_bias|q_proj\.weight)", "EVA or BEiT, whose keys have no bias"),
    (r"blocks\.0\.gamma_1", "BEiT, CaiT or a ViT with rotary positions"),
    (r"blocks\.0\..*rel(ative)?_pos.*", "a ViT with relative positions"),
    (r"blocks\.0\.mlp\.(fc1_g|fc1_x|w1|w12)\..*", "a ViT with a gated MLP (SwiGLU)"),
    (r"blocks\.0\.(in_proj|attns\.0)\..*", "a ViT of parallel layers"),
    (r"blocks\.0\..*lambda_q1", "a ViT with differential attention"),
    (r"blocks\.0\.(attn|mlp)\.norm\.weight", "BEiT-3 or another with norms within attention and MLP"),
    (r"patch_embed\.backbone\..*", "a hybrid, whose patches come from a convolutional network"),
)


def refuse_other_architectures(place: str, files: TensorFiles) -> None:
    """Raise ConfigError if the weights are not a plain ViT's; name the architecture.

    Args:
        place: path or id of the weights, for the error.
        files: files with the weights.
    """
    for pattern, what in _SIGNS:
        found = next((name for name in files if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise ConfigError(f"{place} looks like {what} ({found}); megavit's network is a plain ViT")
    if {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"} <= set(files):
        wide, narrow = files.shape("blocks.0.mlp.fc1.weight")[0], files.shape("blocks.0.mlp.fc2.weight")[1]
        if wide == 2 * narrow:
            raise ConfigError(
                f"{place} looks like a ViT with a gated MLP (fc1 makes {wide} values, fc2 reads {narrow}); megavit's "
                f"network is a plain ViT"
            )
