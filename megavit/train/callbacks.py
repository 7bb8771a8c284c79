"""Define the report that the trainer passes to its callbacks at the end of each step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """One training step on this rank.

    Attributes:
        step: steps done, this one included.
        sums: the task's sums over this rank's micro batches; empty except on the last pipeline stage.
        grad_norm: gradient norm before clipping.
        skipped: why the weights were not updated; None if they were.
    """

    step: int
    sums: dict[str, Tensor]
    grad_norm: float
    skipped: str | None


StepCallback = Callable[[StepReport], None]
