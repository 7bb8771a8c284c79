"""LayerNorm with support for sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with the constructor that a Megatron-Core spec calls.

    Under sequence parallelism each tensor-parallel rank norms its own tokens, so it computes only a part of the
    gradients of weight and bias. The attribute `sequence_parallel` makes Megatron-Core's `finalize_model_grads` add the
    parts.

    Args:
        config: Megatron-Core's configuration; `sequence_parallel` is used.
        hidden_size: width of the normalised dim.
        eps: epsilon.
        splits_tokens: False if the norm sees every token also under sequence parallelism (after pooling).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, *, splits_tokens: bool = True, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and splits_tokens  # type: ignore[attr-defined]
