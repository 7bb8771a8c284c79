"""Compute sine-cosine position embeddings, and resize learned ones to another grid.

Shapes: P patches, H hidden, N = class tokens + P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(grid: tuple[int, int], hidden_size: int, *, class_tokens: int) -> Tensor:
    """Return fixed positions_NH in fp32.

    The first half of the channels encodes the column, the second half the row. Each half holds sines, then cosines,
    of wavelengths that rise geometrically from 2π to 10000 · 2π. Class tokens get zeros.

    Args:
        grid: numbers of patches down and across.
        hidden_size: number of channels H, divisible by 4.
        class_tokens: number of class tokens.

    Source: arXiv 2104.02057, section 4 (MoCo v3), in the channel order of MAE checkpoints.
    """
    quarter = hidden_size // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    across, down = columns.flatten().outer(frequency), rows.flatten().outer(frequency)
    patches_PH = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
    return F.pad(patches_PH, (0, 0, class_tokens, 0)).float()


def resize_positions(
    positions_N1H: Tensor, *, class_tokens: int, grid: tuple[int, int], to_grid: tuple[int, int]
) -> Tensor:
    """Resize positions to another grid of patches, bicubic in fp32; those of class tokens do not change.

    Args:
        positions_N1H: class tokens first, then the patches row by row.
        class_tokens: number of class tokens.
        grid: numbers of patches down and across that the positions have.
        to_grid: numbers of patches down and across that the result has.

    Source: facebookresearch/mae, util/pos_embed.py. Hugging Face's ViT resizes the same way; neither antialiases.
    """
    tokens, patches = positions_N1H.float().tensor_split([class_tokens])
    image = patches.unflatten(0, grid).permute(2, 3, 0, 1)
    resized = F.interpolate(image, size=to_grid, mode="bicubic", align_corners=False)
    return torch.cat([tokens, resized.permute(2, 3, 0, 1).flatten(0, 1)])
