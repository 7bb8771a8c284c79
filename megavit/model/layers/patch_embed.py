"""Map images to tokens: cut patches, embed them, add class tokens and positions.

Shapes: B images, C channels, P patches, K kept ones, V = C · patch² values of a patch, H hidden,
N = class tokens + P (or K).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.model.config import ModelConfig, Positions
from megavit.model.layers.pos_embed import sincos_positions


def patchify(images_BCYX: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches_BPV, row by row.

    The values of a patch are ordered by channel, row and column. A convolution's weights `[H, C, p, p]` have the same
    order and load by a reshape.
    """
    b, c, height, width = images_BCYX.shape
    p = patch_size
    patches = images_BCYX.reshape(b, c, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), c * p * p)


def unpatchify(patches_BPV: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Return images_BCYX from patches, the inverse of `patchify`.

    Args:
        patches_BPV: patches, row by row.
        grid: numbers of patches down and across.
        patch_size: side of a patch, in pixels.
    """
    (rows, columns), p = grid, patch_size
    patches = patches_BPV.unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def no_weight_decay(value: Tensor) -> torch.nn.Parameter:
    """Return a parameter that weight decay skips, although it has more than one dim."""
    parameter = torch.nn.Parameter(value)
    parameter.no_decay = True  # type: ignore[attr-defined]
    return parameter


class PatchEmbed(torch.nn.Module):
    """Project patches, prepend class tokens and add positions; replicated on every tensor-parallel rank.

    Args:
        config: the model group.
        image_size: [height, width] in pixels.
        channels: channels of an image.
        dtype: number format of the parameters.
    """

    def __init__(
        self, config: ModelConfig, *, image_size: list[int], channels: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.class_tokens = config.class_tokens
        self.dropout = config.hidden_dropout
        hidden = config.hidden_size
        patch_values = channels * config.patch_size**2
        self.proj = torch.nn.Linear(patch_values, hidden, bias=config.patch_bias, dtype=dtype)
        self.cls_token: torch.nn.Parameter | None = None
        if config.class_tokens:
            self.cls_token = no_weight_decay(torch.zeros(config.class_tokens, 1, hidden, dtype=dtype))
        num_tokens = config.num_tokens(image_size)
        if config.positions is Positions.learned:
            self.pos_embed = no_weight_decay(torch.zeros(num_tokens, 1, hidden, dtype=dtype))
        else:
            fixed = sincos_positions(config.patch_grid(image_size), hidden, class_tokens=config.class_tokens)
            self.register_buffer("pos_embed", fixed.unsqueeze(1).to(dtype), persistent=False)

    def forward(self, patches_BPV: Tensor, ids_keep_BK: Tensor | None = None) -> Tensor:
        """Map patches of normalised images to tokens_BNH.

        Args:
            patches_BPV: patches from `patchify`.
            ids_keep_BK: int64 indices of the patches to embed, in the order of their tokens; None for all.
        """
        if ids_keep_BK is not None:
            patches_BPV = patches_BPV.take_along_dim(ids_keep_BK.unsqueeze(2), dim=1)
        positions_BNH = self.pos_embed.transpose(0, 1) if ids_keep_BK is None else self._positions_of(ids_keep_BK)
        tokens_BNH = self.proj(patches_BPV.to(self.proj.weight.dtype))
        if self.cls_token is not None:
            classes = self.cls_token.transpose(0, 1).expand(tokens_BNH.shape[0], -1, -1)
            tokens_BNH = torch.cat([classes, tokens_BNH], dim=1)
        return F.dropout(tokens_BNH + positions_BNH, self.dropout, training=self.training)

    def _positions_of(self, ids_keep_BK: Tensor) -> Tensor:
        """Return positions_BNH of the class tokens and of each image's kept patches."""
        patches = self.pos_embed[self.class_tokens :, 0][ids_keep_BK]
        classes = self.pos_embed[: self.class_tokens].transpose(0, 1).expand(patches.shape[0], -1, -1)
        return torch.cat([classes, patches], dim=1)
