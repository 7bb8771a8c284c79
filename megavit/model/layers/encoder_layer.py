"""Define the encoder layer (pre-norm attention and MLP), and the spec that puts it into a TransformerBlock.

Shapes: B images, N tokens, H hidden, F width of the MLP; under sequence parallelism N, of this rank, comes before B.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megavit.model.layers.attention import SelfAttention
from megavit.model.layers.attention_backends import Kernel
from megavit.model.layers.drop_path import DropPath, Residual
from megavit.model.layers.linear import apply_linear
from megavit.model.layers.norm import LayerNorm


@dataclass
class EncoderLayerSubmodules:
    """The replaceable parts of the layer: the classes of the parallel linears, and the attention kernel."""

    column: type
    row: type
    kernel: Kernel


def encoder_layer_spec(
    submodules: EncoderLayerSubmodules, *, drop_path: float, layer_scale: float | None, recompute_selectively: bool
) -> ModuleSpec:
    """Describe the encoder layer to TransformerBlock.

    Args:
        submodules: classes of the linears, and the attention kernel.
        drop_path: the last layer's probability; layer i of L gets drop_path · i / (L − 1).
        layer_scale: initial value of the residual scale; None for none.
        recompute_selectively: whether to free the outputs of both norms, fc1 and GELU and recompute them in the
            backward pass.
    """
    settings = dict(drop_path=drop_path, layer_scale=layer_scale, recompute_selectively=recompute_selectively)
    return ModuleSpec(module=EncoderLayer, params=settings, submodules=submodules)


class Mlp(MegatronModule):
    """fc2(gelu(fc1(x))), fc1 column-parallel and fc2 row-parallel."""

    def __init__(
        self, config: TransformerConfig, *, column: type, row: type, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        linear: dict[str, Any] = dict(
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pg_collection.tp,
        )
        h, f = config.hidden_size, config.ffn_hidden_size
        self.fc1 = build_module(column, h, f, gather_output=False, **linear)
        self.fc2 = build_module(row, f, h, input_is_parallel=True, **linear)

    def fc1_gelu(self, tokens_BNH: Tensor) -> Tensor:
        """Return gelu(fc1(x)), the part of the MLP whose output is large and cheap to recompute."""
        return F.gelu(apply_linear(self.fc1, tokens_BNH))

    def fc2_linear(self, wide_BNF: Tensor) -> Tensor:
        """Apply the second linear."""
        return apply_linear(self.fc2, wide_BNF)


class EncoderLayer(GraphableMegatronModule, BaseTransformerLayer):
    """x + attn(norm1(x)), then x + mlp(norm2(x)).

    Args:
        config: Megatron-Core's configuration of the block.
        submodules: classes of the linears, and the attention kernel.
        layer_number: 1-based within the stage; stored as the number within the full model.
        pg_collection: process groups; `tp` and `pp` are used.
        vp_stage: virtual pipeline stage.
        drop_path, layer_scale, recompute_selectively: see `encoder_layer_spec`.

    Source: arXiv 2010.11929, section 3.1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: EncoderLayerSubmodules,
        layer_number: int = 1,
        *,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        recompute_selectively: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        # TransformerBlock passes the number within the stage. Without the stage's offset the checkpoint keys of the
        # stages collide: rank 0 raises, the others hang (Megatron-Core 0.16.1).
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        self.tp_group = pg_collection.tp
        self.recompute_selectively = recompute_selectively
        depth = (self.layer_number - 1) / max(1, config.num_layers - 1)
        self.drop_path = DropPath(drop_path * depth, sequence_parallel=config.sequence_parallel)
        linears: dict[str, Any] = dict(column=submodules.column, row=submodules.row, pg_collection=pg_collection)
        self.norm1 = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.attn = SelfAttention(config, kernel=submodules.kernel, **linears)
        self.residual1 = Residual(config, layer_scale=layer_scale)
        self.norm2 = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = Mlp(config, **linears)
        self.residual2 = Residual(config, layer_scale=layer_scale)
        # `compile_layer` replaces this attribute.
        self.transform = self._transform

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens_BNH after the layer, and the context that TransformerBlock expects, which is always None."""
        assert attention_mask is None, "a ViT attends to every token"
        keep_RB11: Tensor | None = None
        if self.training and self.drop_path.rate > 0:
            keep_RB11 = self.drop_path.draw(hidden_states, branches=2)
        return self.transform(hidden_states, keep_RB11), None

    def compile_layer(self) -> None:
        """Compile the layer's arithmetic with torch.compile as one graph; a graph break is an error.

        `forward` itself is not compiled: its hooks wait for weights that are still being gathered, and it samples drop
        path.
        """
        graph = torch.compile(self._transform, fullgraph=True)
        config = self.config
        draws = config.hidden_dropout > 0 or config.attention_dropout > 0
        self.transform = self._with_gradient(graph) if draws and config.recompute_granularity == "full" else graph

    def _with_gradient(self, graph: Callable[[Tensor, Tensor | None], Tensor]) -> Any:
        """Make both forward passes of full recompute run the graph that is compiled for gradients.

        The first pass runs without gradients and the second with them. The compiler would make one graph for each, and
        the two graphs may sample dropout in different orders.
        """

        def transform(tokens_BNH: Tensor, keep_RB11: Tensor | None) -> Tensor:
            if torch.is_grad_enabled() or not self.training:
                return graph(tokens_BNH, keep_RB11)
            with torch.enable_grad():
                return graph(tokens_BNH.detach().requires_grad_(), keep_RB11).detach()

        return transform

    def _transform(self, tokens_BNH: Tensor, keep_RB11: Tensor | None) -> Tensor:
        keep1_B11, keep2_B11 = (None, None) if keep_RB11 is None else keep_RB11.unbind()
        tokens_BNH = self.residual1(tokens_BNH, self._maybe_recompute(self._normed1, self.attn, tokens_BNH), keep1_B11)
        return self.residual2(
            tokens_BNH, self._maybe_recompute(self._widened, self.mlp.fc2_linear, tokens_BNH), keep2_B11
        )

    def _normed1(self, tokens_BNH: Tensor) -> Tensor:
        return self.norm1(tokens_BNH)

    def _widened(self, tokens_BNH: Tensor) -> Tensor:
        return self.mlp.fc1_gelu(self.norm2(tokens_BNH))

    def _maybe_recompute(self, cheap: Any, costly: Any, tokens_BNH: Tensor) -> Tensor:
        """Return costly(cheap(x)); selective recompute frees the output of `cheap` and recomputes it when needed."""
        if not (self.recompute_selectively and self.training):
            return costly(cheap(tokens_BNH))
        # fp8=None: Megatron-Core 0.16.1 takes False as a request for FP8 contexts.
        recompute = CheckpointWithoutOutput(fp8=None)
        output_BNH = costly(recompute.checkpoint(cheap, tokens_BNH))
        recompute.discard_output_and_register_recompute(output_BNH)
        return output_BNH
