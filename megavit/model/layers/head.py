"""The classifier head, which maps tokens to class logits, and the batch norm of a linear probe.

Shapes: N tokens (all of them, on every rank), B images, H hidden, K classes.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.model.config import Head, ModelConfig, Pool
from megavit.model.layers.norm import LayerNorm
from megavit.model.parameters import CLASSIFIER_BIAS, CLASSIFIER_WEIGHT


class FeatureNorm(torch.nn.Module):
    """Batch norm without weights, for the features of a frozen encoder.

    In training the statistics cover a micro batch of all data-parallel ranks. They depend on the number of these
    images, not on how the images are split over ranks. They are fp32 in every number format of the network.

    Args:
        hidden_size: feature width H.
        group: process group of the data-parallel ranks.

    Source: arXiv 2111.06377, section A.1.
    """

    running_mean: Tensor
    running_var: Tensor
    eps = 1e-6
    momentum = 0.1

    def __init__(self, hidden_size: int, *, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(hidden_size))
        self.register_buffer("running_var", torch.ones(hidden_size))
        self._group = group

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self

    def forward(self, features_BH: Tensor) -> Tensor:
        """Return features_BH, normalised, in fp32."""
        features_BH = features_BH.float()
        mean_H, var_H = self._measure(features_BH) if self.training else (self.running_mean, self.running_var)
        return F.batch_norm(features_BH, mean_H, var_H, eps=self.eps)

    @torch.no_grad()
    def _measure(self, features_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance over the images of all ranks, and update the running statistics with them."""
        count = features_BH.shape[0] * self._group.size()
        mean_H = features_BH.sum(dim=0)
        dist.all_reduce(mean_H, group=self._group)
        mean_H /= count
        var_H = (features_BH - mean_H).square().sum(dim=0)
        dist.all_reduce(var_H, group=self._group)
        # As in torch's batch norm, the running variance divides by count − 1 and the variance in use by count. Values
        # that are not finite are skipped: they would stay in the running statistics, although the step is refused.
        for running_H, new_H in ((self.running_mean, mean_H), (self.running_var, var_H / max(count - 1, 1))):
            running_H.lerp_(new_H.where(new_H.isfinite(), running_H), self.momentum)
        return mean_H, var_H / count


class ClassifierHead(torch.nn.Module):
    """Pool the tokens, apply the norm if the block has not, and classify; replicated on every tensor-parallel rank.

    Args:
        config: the model group.
        mcore_config: Megatron-Core's configuration, for dtype and epsilon.
        num_classes: number of classes K.
        feature_norm: norm of the features before the last matrix; None for none.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mcore_config: TransformerConfig,
        num_classes: int,
        feature_norm: FeatureNorm | None = None,
    ) -> None:
        super().__init__()
        self.class_tokens = config.class_tokens
        hidden, dtype = config.hidden_size, mcore_config.params_dtype
        self.fc_norm: LayerNorm | None = None
        if config.pool is Pool.mean:
            self.fc_norm = LayerNorm(mcore_config, hidden, config.norm_eps, splits_tokens=False)
        self.pre: torch.nn.Linear | None = None
        if config.head is Head.tanh_mlp:
            self.pre = torch.nn.Linear(hidden, hidden, dtype=dtype)
        self.feature_norm = feature_norm
        self.out = torch.nn.Linear(hidden, num_classes, dtype=dtype)

    def forward(self, tokens_BNH: Tensor) -> Tensor:
        """Return logits_BK in fp32."""
        if self.fc_norm is not None:
            pooled_BH = self.fc_norm(tokens_BNH[:, self.class_tokens :].mean(dim=1))
        else:
            pooled_BH = tokens_BNH[:, 0]
        if self.pre is not None:
            pooled_BH = self.pre(pooled_BH).tanh()
        if self.feature_norm is not None:
            pooled_BH = self.feature_norm(pooled_BH).to(self.out.weight.dtype)
        return self.out(pooled_BH).float()

    def weights_without_norm(self) -> dict[str, Tensor]:
        """Return the last matrix and its bias in fp32, with a feature norm folded into them, by parameter name."""
        weight_KH, bias_K = self.out.weight.detach().float(), self.out.bias.detach().float()
        if self.feature_norm is not None:
            norm = self.feature_norm
            weight_KH = weight_KH / (norm.running_var + norm.eps).sqrt()
            bias_K = bias_K - weight_KH @ norm.running_mean
        return {CLASSIFIER_WEIGHT: weight_KH, CLASSIFIER_BIAS: bias_K}
