"""The Vision Transformer in plain torch, for `megavit.load`, exports and as the reference in tests.

It needs no Megatron-Core and has no parallelism. Parameter names and shapes are timm's.
Shapes: B images, C channels, N tokens, H hidden, A heads, D head width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.model.config import Head, ModelConfig, Pool, Positions
from megavit.model.layers.pos_embed import sincos_positions


class TorchAttention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are all queries, then all keys, then all values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_heads
        head_dim = hidden // config.num_heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = nn.LayerNorm(head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        b, n, h = tokens_BNH.shape
        q_BAND, k_BAND, v_BAND = self.qkv(tokens_BNH).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BAND = F.scaled_dot_product_attention(self.q_norm(q_BAND), self.k_norm(k_BAND), v_BAND)
        return self.proj(mixed_BAND.transpose(1, 2).reshape(b, n, h))


class LayerScale(nn.Module):
    """A learned scale per channel."""

    def __init__(self, hidden_size: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((hidden_size,), start))

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        return tokens_BNH * self.gamma


class TorchMlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens_BNH)))


class TorchBlock(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, scale = config.hidden_size, config.layer_scale
        self.norm1 = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.attn = TorchAttention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(hidden, scale)
        self.norm2 = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.mlp = TorchMlp(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(hidden, scale)

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        tokens_BNH = tokens_BNH + self.ls1(self.attn(self.norm1(tokens_BNH)))
        return tokens_BNH + self.ls2(self.mlp(self.norm2(tokens_BNH)))


class TorchPatchEmbed(nn.Module):
    """Patch embedding by a strided convolution."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(channels, config.hidden_size, kernel_size=p, stride=p, bias=config.patch_bias)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.proj(images_BCYX).flatten(2).transpose(1, 2)


class TorchViT(nn.Module):
    """The classifier on one device, for evaluation: it has neither dropout nor drop path.

    Args:
        config: the model group.
        image_size: [height, width] in pixels.
        channels: channels of an image.
        num_classes: number of classes K; 0 for no head.
    """

    def __init__(self, config: ModelConfig, *, image_size: list[int], channels: int, num_classes: int) -> None:
        super().__init__()
        hidden, self.class_tokens = config.hidden_size, config.class_tokens
        self.patch_embed = TorchPatchEmbed(config, channels)
        if config.class_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, config.class_tokens, hidden))
        if config.positions is Positions.learned:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens(image_size), hidden))
        else:
            grid = config.patch_grid(image_size)
            fixed = sincos_positions(grid, hidden, class_tokens=config.class_tokens)
            self.register_buffer("pos_embed", fixed.unsqueeze(0), persistent=False)
        self.blocks = nn.ModuleList([TorchBlock(config) for _ in range(config.num_layers)])
        self.pool, norms_last = config.pool, config.pool is Pool.mean
        self.norm = nn.Identity() if norms_last else nn.LayerNorm(hidden, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(hidden, eps=config.norm_eps) if norms_last else nn.Identity()
        self.pre_logits: nn.Module = nn.Identity()
        if config.head is Head.tanh_mlp:
            self.pre_logits = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Map normalised images to logits_BK."""
        return self.head(self.pre_logits(self.features(images_BCYX)))

    def tokens(self, images_BCYX: Tensor) -> Tensor:
        """Map normalised images to tokens_BNH after the last layer, class tokens first."""
        tokens_BNH = self.patch_embed(images_BCYX)
        if self.class_tokens:
            tokens_BNH = torch.cat([self.cls_token.expand(tokens_BNH.shape[0], -1, -1), tokens_BNH], dim=1)
        tokens_BNH = tokens_BNH + self.pos_embed
        for block in self.blocks:
            tokens_BNH = block(tokens_BNH)
        return self.norm(tokens_BNH)

    def features(self, images_BCYX: Tensor, *, pool: Pool | None = None) -> Tensor:
        """Map normalised images to features_BH, the input of the head.

        Args:
            images_BCYX: normalised images.
            pool: tokens to pool; None for those of the model's own head.
        """
        tokens_BNH = self.tokens(images_BCYX)
        means = (pool or self.pool) is Pool.mean
        return self.fc_norm(tokens_BNH[:, self.class_tokens :].mean(dim=1) if means else tokens_BNH[:, 0])
