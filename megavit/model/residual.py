"""What happens to a residual branch before it is added: dropout, layer scale, drop path.

Shapes: N tokens (of this rank, under sequence parallelism), B images, H hidden.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class Residual(torch.nn.Module):
    """residual + drop_path(gamma · dropout(branch)).

    Args:
        config: width, dropout and sequence parallelism.
        drop_path: probability that an image skips this branch.
        layer_scale: start value of gamma, None for no scale.

    Source: drop path, arXiv 1603.09382; layer scale, arXiv 2103.17239, section 2.
    """

    def __init__(self, config: TransformerConfig, *, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.drop_path = drop_path
        self.sequence_parallel = config.sequence_parallel
        self.gamma: torch.nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma = torch.nn.Parameter(torch.full((config.hidden_size,), layer_scale, dtype=config.params_dtype))
            self.gamma.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, residual_NBH: Tensor, branch_NBH: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            branch_NBH = F.dropout(branch_NBH, self.dropout)
        if self.gamma is not None:
            branch_NBH = branch_NBH * self.gamma
        if self.training and self.drop_path > 0:
            branch_NBH = branch_NBH * self._draw_keep(branch_NBH)
        return residual_NBH + branch_NBH

    def _draw_keep(self, branch_NBH: Tensor) -> Tensor:
        keep = 1.0 - self.drop_path
        keep_1B1 = torch.empty(1, branch_NBH.shape[1], 1, dtype=branch_NBH.dtype, device=branch_NBH.device)
        if self.sequence_parallel:
            # The block runs in a state of its own per rank here; an image's tokens on all ranks must drop together.
            with tensor_parallel.get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                keep_1B1.bernoulli_(keep)
        else:
            keep_1B1.bernoulli_(keep)
        return keep_1B1.div_(keep)
