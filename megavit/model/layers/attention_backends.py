"""Choose the attention kernel by its explicit name; a kernel that cannot run is an error, never replaced by another.

Shapes: B images, A heads (of this rank), N tokens, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavit.errors import ConfigError
from megavit.model.config import AttentionBackend

# q_BAND, k_BAND, v_BAND, dropout probability → mixed_BAND.
Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attention_kernel(
    attention: AttentionBackend,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    *,
    device: torch.device,
) -> Kernel:
    """Return the kernel that the configuration names.

    Args:
        attention: name of the kernel.
        config: number of heads and head width.
        pg_collection: process groups; Transformer Engine reads `tp`.
        device: device of the tensors.

    Raises:
        ConfigError: if the kernel cannot run here; the message says what to install or to set instead.
    """
    if attention is AttentionBackend.sdpa:
        return _sdpa
    if device.type != "cuda":
        raise ConfigError(
            f"model.attention_backend={attention.value} runs on CUDA only and this run is on {device.type}; set "
            f"model.attention_backend=sdpa"
        )
    if attention is AttentionBackend.sdpa_flash:
        return _sdpa_flash
    if attention is AttentionBackend.flash_attn:
        return _flash_attn()
    return _transformer_engine(config, pg_collection)


def sdpa_choice(q_BAND: Tensor) -> str:
    """Return the name of the kernel that torch chooses for `sdpa` with such queries, for the log."""
    return SDPBackend(torch._fused_sdp_choice(q_BAND, q_BAND, q_BAND)).name.lower()


def _sdpa(q_BAND: Tensor, k_BAND: Tensor, v_BAND: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, dropout_p=dropout)


def _sdpa_flash(q_BAND: Tensor, k_BAND: Tensor, v_BAND: Tensor, dropout: float) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, dropout_p=dropout)


def _flash_attn() -> Kernel:
    try:
        # Version 4 can be installed without this function: it has only `flash_attn.cute`, whose functions differ.
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ConfigError(
            "model.attention_backend=flash_attn needs the flash-attn package, version 2, which is not installed: pip "
            "install 'megavit[flash]' on a machine with CUDA's compiler, or set model.attention_backend=sdpa_flash "
            "(torch's own copy)"
        ) from error

    def kernel(q_BAND: Tensor, k_BAND: Tensor, v_BAND: Tensor, dropout: float) -> Tensor:
        q_BNAD, k_BNAD, v_BNAD = (part.transpose(1, 2) for part in (q_BAND, k_BAND, v_BAND))
        return flash_attn_func(q_BNAD, k_BNAD, v_BNAD, dropout_p=dropout).transpose(1, 2)

    return kernel


def _transformer_engine(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> Kernel:
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ConfigError(
            "model.attention_backend=te needs Transformer Engine, which is not installed: pip install 'megavit[te]' "
            "on a machine with CUDA, or set model.attention_backend=sdpa_flash"
        )
    from transformer_engine.pytorch import DotProductAttention

    core: Any = DotProductAttention(
        config.num_attention_heads,
        config.kv_channels,
        attention_dropout=config.attention_dropout,
        qkv_format="bshd",
        attn_mask_type="no_mask",
        tp_size=config.tensor_model_parallel_size,
        tp_group=pg_collection.tp,
    )

    def kernel(q_BAND: Tensor, k_BAND: Tensor, v_BAND: Tensor, dropout: float) -> Tensor:
        core.train(dropout > 0)
        q_BNAD, k_BNAD, v_BNAD = (part.transpose(1, 2) for part in (q_BAND, k_BAND, v_BAND))
        mixed_BNH = core(q_BNAD, k_BNAD, v_BNAD)
        return mixed_BNH.unflatten(2, (-1, config.kv_channels)).transpose(1, 2)

    return kernel
