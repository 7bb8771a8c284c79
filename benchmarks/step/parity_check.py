"""Who is timed: those that compute what megavit computes, before and after some steps."""

from dataclasses import dataclass

import numpy as np

# Of the output relative to its largest value, and of the loss. The largest measured with ViT-B/16 and MAE-B, after two
# steps: 1.5e-6 and 2.7e-6 in fp32, 1.3e-2 and 7.1e-3 in bf16.
_BOUNDS = {"fp32": (1e-4, 1e-5), "bf16": (0.05, 0.05)}
STEPS = 2


@dataclass(frozen=True)
class StepOutput:
    """What a network makes of the batch.

    Attributes:
        output: scores or pixels.
        loss: of it.
    """

    output: np.ndarray
    loss: float


@dataclass(frozen=True)
class Difference:
    """How far two candidates are apart.

    Attributes:
        output: the largest difference, over the largest value.
        loss: the difference over the loss.
    """

    output: float
    loss: float

    def is_small(self, precision: str) -> bool:
        """Whether it is rounding; what is not a number is not."""
        output, loss = _BOUNDS[precision]
        return self.output <= output and self.loss <= loss

    def __str__(self) -> str:
        return f"output apart by {self.output:.1e} of its largest value, loss by {self.loss:.1e}"


def difference(found: StepOutput, reference: StepOutput) -> Difference | None:
    """How far a candidate is from another; None where their outputs have other shapes."""
    if found.output.shape != reference.output.shape:
        return None
    largest = float(np.abs(reference.output).max())
    return Difference(
        float(np.abs(found.output - reference.output).max()) / largest, abs(found.loss / reference.loss - 1)
    )
