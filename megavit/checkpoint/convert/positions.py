"""Whether another library's positions are those that this network computes."""

import torch
from torch import Tensor

from megavit.checkpoint.convert.external_model import ExternalModel
from megavit.errors import ConfigError
from megavit.model.config import Positions
from megavit.model.layers.patch_embed import sincos_positions


def are_sincos(positions_NH: Tensor, grid: tuple[int, int], *, class_tokens: int) -> bool:
    """Whether positions are those that `sincos_positions` computes, which other libraries keep as weights."""
    if positions_NH.shape[1] % 4:
        return False
    ours_NH = sincos_positions(grid, positions_NH.shape[1], class_tokens=class_tokens)
    # Theirs were computed in other precision, in another order.
    return torch.allclose(positions_NH.float(), ours_NH, atol=1e-5)


def choose_positions(external: ExternalModel) -> None:
    """A masked autoencoder's positions are sine and cosine, or learned; its decoder's must be sine and cosine."""
    grid, tokens = external.model.patch_grid(external.image_size), external.model.class_tokens
    if are_sincos(external.weight("pos_embed")[0], grid, class_tokens=tokens):
        external.model.positions = Positions.sincos
    if not are_sincos(external.weight("decoder_pos_embed")[0], grid, class_tokens=tokens):
        raise ConfigError(
            "the decoder's positions are no sine and cosine of the patches' places, which ours always are"
        )
