"""Keep an exponential moving average of the weights, which often evaluates better than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor


class ModelEma:
    """The moving average of this rank's weights, in fp32, 4 bytes per weight.

    Under BF16 O2 the bf16 weights are averaged: rounding averages out, and the fp32 copies are sharded over ranks.

    Args:
        chunks: this rank's stages by name; the average starts from their weights.
        decay: fraction of the average that each step keeps.

    Source: arXiv 1412.6980, section 7.2 (there for Adam), without bias correction.
    """

    def __init__(self, chunks: Mapping[str, MegatronModule], *, decay: float) -> None:
        self.decay = decay
        self._followed = {name: dict(chunk.named_parameters()) for name, chunk in chunks.items()}
        self.weights: dict[str, dict[str, Tensor]] = {
            name: {key: weight.detach().float().clone() for key, weight in followed.items()}
            for name, followed in self._followed.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights after a step."""
        for name, followed in self._followed.items():
            averages = list(self.weights[name].values())
            torch._foreach_lerp_(averages, [weight.float() for weight in followed.values()], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the chunks inside the context, and restore their weights bit for bit after it."""
        pairs = [
            (weight, self.weights[name][key])
            for name, followed in self._followed.items()
            for key, weight in followed.items()
        ]
        current = [weight.detach().clone() for weight, _ in pairs]
        with torch.no_grad():
            for weight, average in pairs:
                weight.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (weight, _), original in zip(pairs, current, strict=True):
                    weight.copy_(original)
