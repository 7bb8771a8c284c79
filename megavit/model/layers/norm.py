"""A LayerNorm that knows sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm in the form a Megatron-Core spec builds.

    Under sequence parallelism each tensor-parallel rank norms its own tokens, so the gradients of weight and bias are
    parts of a sum: the mark on them makes Megatron-Core's `finalize_model_grads` add them up.

    Args:
        config: for `sequence_parallel`.
        hidden_size: normalised width.
        eps: epsilon.
        splits_tokens: False where the norm sees every token even under sequence parallelism (after pooling).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, *, splits_tokens: bool = True, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and splits_tokens  # type: ignore[attr-defined]
