"""megavit's configuration in Megatron-Core's words."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.model.config import ModelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.stages import megatron_layout


def _left_to_initialise(weight: Tensor) -> Tensor:
    # Weights are drawn afterwards, by name, so that they are the same in every layout (model/init.py). Megatron-Core
    # must still believe that it initialises: only then it marks its weights as tensor-parallel (0.16.1).
    return weight


def transformer_config(
    config: ModelConfig, layout: ParallelLayout, *, stages: list[int], dtype: torch.dtype
) -> TransformerConfig:
    """Describe the encoder to TransformerBlock and to the pipeline schedules.

    Args:
        config: the model group.
        layout: the parallel sizes and the device.
        stages: encoder layers per pipeline stage.
        dtype: of parameters and of what crosses a stage.
    """
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
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        init_method=_left_to_initialise,
        output_layer_init_method=_left_to_initialise,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        batch_p2p_comm=layout.device.type == "cuda",
        # Freed outputs gave NaN on gloo, which may still be sending them (Megatron-Core 0.16.1).
        deallocate_pipeline_outputs=layout.device.type == "cuda",
    )
