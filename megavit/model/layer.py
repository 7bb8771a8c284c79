"""megavit's encoder layer, pre-norm attention and MLP, placed in Megatron-Core's TransformerBlock by a spec.

Shapes: N tokens (of this rank, under sequence parallelism), B images, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megavit.errors import ConfigError
from megavit.model.attention import SelfAttention
from megavit.model.config import Linears
from megavit.model.norm import LayerNorm
from megavit.model.residual import Residual


@dataclass
class EncoderLayerSubmodules:
    """The parts a spec may exchange: the four parallel linears."""

    column: type
    row: type


def encoder_layer_spec(linears: Linears, *, drop_path: float, layer_scale: float | None) -> ModuleSpec:
    """Describe the encoder layer to TransformerBlock.

    Args:
        linears: whose parallel linears to build it of.
        drop_path: the last layer's probability; layer i of L gets drop_path · i / (L − 1).
        layer_scale: start value of the residual scale, None for none.

    Raises:
        ConfigError: if Transformer Engine is asked for and missing.
    """
    column, row = _parallel_linears(linears)
    return ModuleSpec(
        module=EncoderLayer,
        params={"drop_path": drop_path, "layer_scale": layer_scale},
        submodules=EncoderLayerSubmodules(column=column, row=row),
    )


def _parallel_linears(linears: Linears) -> tuple[type, type]:
    if linears is Linears.local:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ConfigError(
            "model.linears=te needs Transformer Engine, which is not installed: pip install 'megavit[te]' on a "
            "machine with CUDA, or set model.linears=local"
        )
    return te.TEColumnParallelLinear, te.TERowParallelLinear


class Mlp(MegatronModule):
    """fc2(gelu(fc1(x))), fc1 column-parallel and fc2 row-parallel."""

    def __init__(
        self, config: TransformerConfig, *, column: type, row: type, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        linear = dict(
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

    def forward(self, tokens_NBH: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens_NBH)[0]))[0]


class EncoderLayer(MegatronModule, BaseTransformerLayer):
    """x + attn(norm1(x)), then x + mlp(norm2(x)).

    Args:
        config: Megatron-Core's configuration of the block.
        submodules: whose linears.
        layer_number: 1-based within the pipeline stage; kept as the number within the whole model.
        pg_collection: process groups; `tp` and `pp` are used.
        vp_stage: virtual pipeline stage.
        drop_path, layer_scale: see `encoder_layer_spec`.

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
        **_: Any,
    ) -> None:
        super().__init__(config)
        # TransformerBlock passes the number within the stage. Without the stage's offset the checkpoint keys of the
        # stages collide: rank 0 raises, the others hang (Megatron-Core 0.16.1).
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        self.tp_group = pg_collection.tp
        depth = (self.layer_number - 1) / max(1, config.num_layers - 1)
        residual = dict(drop_path=drop_path * depth, layer_scale=layer_scale)
        parts = dict(pg_collection=pg_collection)
        self.norm1 = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.attn = SelfAttention(config, qkv=submodules.column, proj=submodules.row, **parts)
        self.residual1 = Residual(config, **residual)
        self.norm2 = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = Mlp(config, column=submodules.column, row=submodules.row, **parts)
        self.residual2 = Residual(config, **residual)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map tokens_NBH to tokens_NBH; the second value is the context that TransformerBlock expects, always None."""
        assert attention_mask is None, "a ViT attends to every token"
        tokens_NBH = hidden_states
        tokens_NBH = self.residual1(tokens_NBH, self.attn(self.norm1(tokens_NBH)))
        tokens_NBH = self.residual2(tokens_NBH, self.mlp(self.norm2(tokens_NBH)))
        return tokens_NBH, None
