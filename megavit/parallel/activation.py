"""Describe the tensors that one pipeline stage sends to the next."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megavit.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that is sent between stages.

    Attributes:
        shape: full shape, before sequence parallelism splits the first dimension.
        dtype: type of the values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ActivationSpec:
    """The tensors that every stage sends to the next, in order.

    Attributes:
        tensors: at least one; an interleaved pipeline sends exactly one (Megatron-Core 0.16.1).
    """

    tensors: tuple[TensorSpec, ...]

    def local_shapes(self, layout: ParallelLayout) -> list[tuple[int, ...]]:
        """Return the shapes that one rank sends."""
        split = layout.tp if layout.sequence_parallel else 1
        return [(spec.shape[0] // split, *spec.shape[1:]) for spec in self.tensors]


def tokens_boundary(num_tokens: int, micro_batch: int, mcore_config: "TransformerConfig") -> ActivationSpec:
    """Return the specification of an encoder's activations: only its tokens, in the layers' order of dimensions."""
    order = (num_tokens, micro_batch) if mcore_config.sequence_parallel else (micro_batch, num_tokens)
    return ActivationSpec((TensorSpec((*order, mcore_config.hidden_size), mcore_config.pipeline_dtype),))
