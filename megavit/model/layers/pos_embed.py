"""Position embeddings: fixed sines and cosines, and learned ones resized to another grid.

Shapes: P patches, H hidden, N = class tokens + P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(grid: tuple[int, int], hidden_size: int, *, class_tokens: int) -> Tensor:
    """Fixed positions_NH: half of the channels tell the column, half the row, each sine then cosine over
    geometric wavelengths from 2π to 10000 · 2π; class tokens stand at zero.

    Source: arXiv 2104.02057, section 4 (MoCo v3), in the channel order that MAE checkpoints hold.
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
    """Positions of one grid of patches for another: bicubic in fp32, class tokens as they are.

    Args:
        positions_N1H: class tokens first, then the patches row by row.
        class_tokens: how many of the first are no patches.
        grid: patches down and across that they are for.
        to_grid: patches down and across that they are to be for.

    Source: facebookresearch/mae, util/pos_embed.py, and Hugging Face's ViT resize alike, without antialiasing.
    """
    tokens, patches = positions_N1H.float().tensor_split([class_tokens])
    image = patches.unflatten(0, grid).permute(2, 3, 0, 1)
    resized = F.interpolate(image, size=to_grid, mode="bicubic", align_corners=False)
    return torch.cat([tokens, resized.permute(2, 3, 0, 1).flatten(0, 1)])
