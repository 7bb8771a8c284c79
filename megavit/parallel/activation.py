"""What crosses from one pipeline stage to the next."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megavit.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a boundary.

    Attributes:
        shape: whole, before sequence parallelism splits its first dimension.
        dtype: of its values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ActivationSpec:
    """The tensors that every stage hands to the next, in order.

    Attributes:
        tensors: at least one; an interleaved pipeline sends exactly one (Megatron-Core 0.16.1).
    """

    tensors: tuple[TensorSpec, ...]

    def local_shapes(self, layout: ParallelLayout) -> list[tuple[int, ...]]:
        """The shapes as one rank sends them."""
        split = layout.tp if layout.sequence_parallel else 1
        return [(spec.shape[0] // split, *spec.shape[1:]) for spec in self.tensors]


def tokens_boundary(num_tokens: int, micro_batch: int, mcore_config: "TransformerConfig") -> ActivationSpec:
    """The boundary of an encoder: its tokens, in the order in which its layers hold them, and nothing else."""
    order = (num_tokens, micro_batch) if mcore_config.sequence_parallel else (micro_batch, num_tokens)
    return ActivationSpec((TensorSpec((*order, mcore_config.hidden_size), mcore_config.pipeline_dtype),))
