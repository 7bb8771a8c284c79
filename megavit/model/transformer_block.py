"""Build Megatron-Core's configuration, and its TransformerBlock of megavit's encoder layers."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megavit.model.config import ModelConfig
from megavit.model.layers.attention_backends import attention_kernel
from megavit.model.layers.encoder_layer import EncoderLayerSubmodules, encoder_layer_spec
from megavit.model.layers.linear import parallel_linears
from megavit.model.layers.norm import LayerNorm
from megavit.parallel.config import ParallelConfig, Recompute, RecomputeMethod
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.stages import megatron_layout


def _left_to_initialise(weight: Tensor) -> Tensor:
    # model/init.py samples the weights afterwards, by name, so that they are the same in every layout. Megatron-Core
    # still has to initialise them: only then it marks weights as tensor-parallel (0.16.1).
    return weight


def transformer_config(
    config: ModelConfig, parallel: ParallelConfig, layout: ParallelLayout, *, stages: list[int], dtype: torch.dtype
) -> TransformerConfig:
    """Build the configuration that TransformerBlock and the pipeline schedules read.

    Args:
        config: the model group.
        parallel: the parallel group.
        layout: this rank's place and device.
        stages: number of encoder layers of each stage.
        dtype: number format of parameters and of the tensors sent between stages.
    """
    full = parallel.recompute is Recompute.full
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_size,
        num_attention_heads=config.num_heads,
        layernorm_epsilon=config.norm_eps,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        qk_layernorm=config.qk_norm,
        activation_func=F.gelu,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_model_parallel_layout=megatron_layout(stages) if layout.pp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        # TransformerBlock recomputes complete layers; `selective` is implemented in EncoderLayer.
        recompute_granularity="full" if full else None,
        recompute_method=(parallel.recompute_method or RecomputeMethod.uniform).value if full else None,
        recompute_num_layers=(parallel.recompute_layers or 1) if full else None,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        init_method=_left_to_initialise,
        output_layer_init_method=_left_to_initialise,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        # Megatron-Core's default synchronises the device after every exchange.
        batch_p2p_sync=False,
        overlap_p2p_comm=parallel.overlap_p2p,
        batch_p2p_comm=layout.device.type == "cuda" and not parallel.overlap_p2p,
        # Freed outputs gave NaN on gloo, which may still be sending them (Megatron-Core 0.16.1).
        deallocate_pipeline_outputs=layout.device.type == "cuda",
    )


def encoder_block(
    config: ModelConfig,
    mcore_config: TransformerConfig,
    layout: ParallelLayout,
    *,
    num_layers: int,
    recompute: Recompute,
    final_norm: bool,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> TransformerBlock:
    """Build one stage's layers.

    Args:
        config: the model group, or that of a decoder.
        mcore_config: from `transformer_config`, with the same sizes.
        layout: this rank's place.
        num_layers: number of layers of this stage.
        recompute: the activations that the backward pass recomputes.
        final_norm: whether the last stage norms its tokens.
        pre_process: whether this is the first stage, which gets its tokens as an argument; others receive them.
        post_process: whether this is the last stage.
        vp_stage: index of the virtual stage; None without virtual stages.
    """
    column, row = parallel_linears(config.linear_backend, device=layout.device)
    kernel = attention_kernel(config.attention_backend, mcore_config, layout.groups, device=layout.device)
    spec = encoder_layer_spec(
        EncoderLayerSubmodules(column=column, row=row, kernel=kernel),
        drop_path=config.drop_path,
        layer_scale=config.layer_scale,
        recompute_selectively=recompute is Recompute.selective,
    )
    return TransformerBlock(
        mcore_config,
        TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=LayerNorm),
        post_layer_norm=final_norm,
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    )
