"""What happens to a residual branch before it is added: dropout, layer scale, drop path.

Shapes: B images, N tokens, H hidden; under sequence parallelism N, of this rank, comes before B.
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
        self.batch_axis = 1 if config.sequence_parallel else 0
        self.gamma: torch.nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma = torch.nn.Parameter(torch.full((config.hidden_size,), layer_scale, dtype=config.params_dtype))
            self.gamma.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, residual_BNH: Tensor, branch_BNH: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            branch_BNH = F.dropout(branch_BNH, self.dropout)
        if self.gamma is not None:
            branch_BNH = branch_BNH * self.gamma
        if self.training and self.drop_path > 0:
            branch_BNH = branch_BNH * self._draw_keep(branch_BNH)
        return residual_BNH + branch_BNH

    def _draw_keep(self, branch_BNH: Tensor) -> Tensor:
        keep = 1.0 - self.drop_path
        shape = [1, 1, 1]
        shape[self.batch_axis] = branch_BNH.shape[self.batch_axis]
        keep_B11 = torch.empty(shape, dtype=branch_BNH.dtype, device=branch_BNH.device)
        if self.sequence_parallel:
            # The block runs in a state of its own per rank here; an image's tokens on all ranks must drop together.
            with tensor_parallel.get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                keep_B11.bernoulli_(keep)
        else:
            keep_B11.bernoulli_(keep)
        return keep_B11.div_(keep)
