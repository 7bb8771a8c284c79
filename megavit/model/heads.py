"""Tokens to class scores.

Shapes: N tokens (all of them, on every rank), B images, H hidden, K classes.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.model.config import Head, ModelConfig, Pool
from megavit.model.norm import LayerNorm


class ClassifierHead(torch.nn.Module):
    """Pool, norm what the block has not normed, classify; whole on every tensor-parallel rank.

    Args:
        config: the model group.
        block: Megatron-Core's configuration, for dtype and epsilon.
        num_classes: K.
    """

    def __init__(self, config: ModelConfig, *, block: TransformerConfig, num_classes: int) -> None:
        super().__init__()
        self.class_tokens = config.class_tokens
        hidden, dtype = config.hidden_size, block.params_dtype
        self.fc_norm: LayerNorm | None = None
        if config.pool is Pool.mean:
            self.fc_norm = LayerNorm(block, hidden, config.norm_eps, splits_tokens=False)
        self.pre: torch.nn.Linear | None = None
        if config.head is Head.tanh_mlp:
            self.pre = torch.nn.Linear(hidden, hidden, dtype=dtype)
        self.out = torch.nn.Linear(hidden, num_classes, dtype=dtype)

    def forward(self, tokens_NBH: Tensor) -> Tensor:
        """Score every class: logits_BK in fp32."""
        if self.fc_norm is not None:
            pooled_BH = self.fc_norm(tokens_NBH[self.class_tokens :].mean(dim=0))
        else:
            pooled_BH = tokens_NBH[0]
        if self.pre is not None:
            pooled_BH = self.pre(pooled_BH).tanh()
        return self.out(pooled_BH).float()
