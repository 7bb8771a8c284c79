"""Bidirectional multi-head self-attention; the tensor-parallel ranks split the heads.

Shapes: B images, N tokens, H hidden, A heads of this rank, D head width. Under sequence parallelism N comes before B.
"""

from contextlib import nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megavit.model.layers.attention_backends import Kernel
from megavit.model.layers.linear import apply_linear
from megavit.model.layers.norm import LayerNorm


class SelfAttention(MegatronModule):
    """softmax(q kᵀ / √D) v between one column-parallel and one row-parallel linear.

    The rows of `qkv` are ordered by head, and within a head by query, key and value, so that a column slice holds
    complete heads at every tensor-parallel size.

    Args:
        config: widths, heads, dropout, qk-norm.
        kernel: function that computes the attention.
        column: class of the column-parallel linear.
        row: class of the row-parallel linear.
        pg_collection: process groups; `tp` is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        kernel: Kernel,
        column: type,
        row: type,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.kernel = kernel
        self.num_heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.head_dim = config.kv_channels
        # Permutations from tokens with heads to the kernels' order of axes, and back.
        self.heads_first = (1, 2, 0, 3) if config.sequence_parallel else (0, 2, 1, 3)
        self.heads_inside = (2, 0, 1, 3) if config.sequence_parallel else (0, 2, 1, 3)
        linear: dict[str, Any] = dict(
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pg_collection.tp,
        )
        self.qkv = build_module(column, config.hidden_size, 3 * config.hidden_size, gather_output=False, **linear)
        # Megatron-Core's finalize_model_grads finds these two norms by name and sums their gradients over the
        # tensor-parallel ranks: every rank norms its own heads with the same weights.
        self.q_layernorm: LayerNorm | None = None
        self.k_layernorm: LayerNorm | None = None
        if config.qk_layernorm:
            self.q_layernorm = LayerNorm(config, self.head_dim, config.layernorm_epsilon, splits_tokens=False)
            self.k_layernorm = LayerNorm(config, self.head_dim, config.layernorm_epsilon, splits_tokens=False)
        self.proj = build_module(row, config.hidden_size, config.hidden_size, input_is_parallel=True, **linear)

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        qkv = apply_linear(self.qkv, tokens_BNH).unflatten(2, (self.num_heads, 3, self.head_dim))
        # `unbind` along an axis of their own lets the backward pass write the three gradients into one tensor.
        q_BAND, k_BAND, v_BAND = (part.permute(*self.heads_first) for part in qkv.unbind(3))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_BAND, k_BAND = self.q_layernorm(q_BAND), self.k_layernorm(k_BAND)
        mixed_BAND = self._mix(q_BAND, k_BAND, v_BAND)
        # The kernels' output is in memory order B, N, A, D. Flattening its last two dims copies nothing, so the kernel
        # and `proj` save the same tensor for the backward pass.
        return apply_linear(self.proj, mixed_BAND.permute(*self.heads_inside).flatten(2))

    def _mix(self, q_BAND: Tensor, k_BAND: Tensor, v_BAND: Tensor) -> Tensor:
        dropout = self.config.attention_dropout if self.training else 0.0
        # Tensor-parallel ranks hold different heads, so their dropout must differ. Under sequence parallelism the
        # TransformerBlock already runs in the rank's own generator state.
        own_state = dropout > 0 and self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_state else nullcontext():
            return self.kernel(q_BAND, k_BAND, v_BAND, dropout)
