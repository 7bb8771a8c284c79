"""Apply dropout, layer scale and drop path to a residual branch before it is added.

Shapes: B images, N tokens, H hidden, R residual branches; under sequence parallelism N, of this rank, comes before B.
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
        layer_scale: initial value of gamma; None for no scale.

    Source: layer scale, arXiv 2103.17239, section 2.
    """

    def __init__(self, config: TransformerConfig, *, layer_scale: float | None) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.gamma: torch.nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma = torch.nn.Parameter(torch.full((config.hidden_size,), layer_scale, dtype=config.params_dtype))
            self.gamma.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, residual_BNH: Tensor, branch_BNH: Tensor, keep_B11: Tensor | None) -> Tensor:
        """Add the branch to the residual stream.

        Args:
            residual_BNH: the residual stream.
            branch_BNH: output of the branch.
            keep_B11: factor per image, sampled by `DropPath`; None keeps every image's branch.
        """
        if self.training and self.dropout > 0:
            branch_BNH = F.dropout(branch_BNH, self.dropout)
        if self.gamma is not None:
            branch_BNH = branch_BNH * self.gamma
        if keep_B11 is not None:
            branch_BNH = branch_BNH * keep_B11
        return residual_BNH + branch_BNH


class DropPath:
    """Sample which images skip which residual branches of a layer.

    The sampling is separate from the layer's arithmetic, so that no compiled graph contains it: a graph would sample in
    its own order, and each layer's rate would need its own graph.

    Args:
        rate: probability that an image skips a branch.
        sequence_parallel: whether each tensor-parallel rank holds a part of every image's tokens.

    Source: arXiv 1603.09382.
    """

    def __init__(self, rate: float, *, sequence_parallel: bool) -> None:
        self.rate, self.sequence_parallel = rate, sequence_parallel

    def draw(self, tokens_BNH: Tensor, *, branches: int) -> Tensor:
        """Sample keep_RB11 for R branches: 0 where an image skips the branch, 1 / (1 − rate) elsewhere."""
        b, keep = tokens_BNH.shape[1 if self.sequence_parallel else 0], 1.0 - self.rate
        shape = (branches, 1, b, 1) if self.sequence_parallel else (branches, b, 1, 1)
        keep_RB11 = torch.empty(shape, dtype=tokens_BNH.dtype, device=tokens_BNH.device)
        if self.sequence_parallel:
            # Here each rank's block has its own generator state, but an image's tokens on all ranks must drop together.
            with tensor_parallel.get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                keep_RB11.bernoulli_(keep)
        else:
            keep_RB11.bernoulli_(keep)
        return keep_RB11.div_(keep)
