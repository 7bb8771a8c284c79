"""Multi-head self-attention, its heads split over the tensor-parallel ranks; bidirectional.

Shapes: B images, N tokens, H hidden, A heads, D head width; on a rank, A is the rank's own heads. Under sequence
parallelism N comes before B.
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

    The rows of `qkv` go head by head, each head's query, key and value together, so that a column slice holds whole
    heads at every tensor-parallel size.

    Args:
        config: widths, heads, dropout, qk-norm.
        kernel: computes the attention itself.
        column: class of the column-parallel linear.
        row: class of the row-parallel linear.
        pg_collection: groups; `tp` is used.
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
        # From tokens with heads to what the kernels take, and back.
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
        # Named as Megatron-Core's finalize_model_grads expects them: every rank norms its own heads with the same
        # weights, so their gradients are summed over the tensor-parallel ranks.
        self.q_layernorm: LayerNorm | None = None
        self.k_layernorm: LayerNorm | None = None
        if config.qk_layernorm:
            self.q_layernorm = LayerNorm(config, self.head_dim, config.layernorm_epsilon, splits_tokens=False)
            self.k_layernorm = LayerNorm(config, self.head_dim, config.layernorm_epsilon, splits_tokens=False)
        self.proj = build_module(row, config.hidden_size, config.hidden_size, input_is_parallel=True, **linear)

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        qkv = apply_linear(self.qkv, tokens_BNH).unflatten(2, (self.num_heads, 3, self.head_dim))
        # Taken apart along its own axis, so that the backward pass puts the three gradients where they belong at once.
        q_BAND, k_BAND, v_BAND = (part.permute(*self.heads_first) for part in qkv.unbind(3))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_BAND, k_BAND = self.q_layernorm(q_BAND), self.k_layernorm(k_BAND)
        mixed_BAND = self._mix(q_BAND, k_BAND, v_BAND)
        # The kernels lay their output out as B, N, A, D: flattening its last two dims copies nothing, so that what
        # the kernel and what `proj` keep for the backward pass is one tensor, not two.
        return apply_linear(self.proj, mixed_BAND.permute(*self.heads_inside).flatten(2))

    def _mix(self, q_BAND: Tensor, k_BAND: Tensor, v_BAND: Tensor) -> Tensor:
        dropout = self.config.attention_dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, so must their dropout; under sequence parallelism the whole
        # block already runs in the rank's own generator state.
        own_state = dropout > 0 and self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_state else nullcontext():
            return self.kernel(q_BAND, k_BAND, v_BAND, dropout)
