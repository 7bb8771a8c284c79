"""Whether another library's positions are those that this network computes."""

import torch

from megavit.errors import ConfigError
from megavit.exchange.foreign_model import ForeignModel
from megavit.model.config import Positions
from megavit.model.embedding import sincos_positions


def choose_positions(foreign: ForeignModel) -> None:
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
