"""Compare a candidate's output and loss with megavit's, before and after some steps."""

from dataclasses import dataclass

import numpy as np

# Bounds of the output's difference relative to its largest value, and of the loss's. The largest measured with ViT-B/16
# and MAE-B after two steps are 1.5e-6 and 2.7e-6 in fp32, 1.3e-2 and 7.1e-3 in bf16.
_BOUNDS = {"fp32": (1e-4, 1e-5), "bf16": (0.05, 0.05)}
STEPS = 2


@dataclass(frozen=True)
class StepOutput:
    """A network's results for the batch.

    Attributes:
        output: class scores or pixels.
        loss: the loss.
    """

    output: np.ndarray
    loss: float


@dataclass(frozen=True)
class Difference:
    """The difference between two candidates.

    Attributes:
        output: largest difference of the outputs, relative to the largest value.
        loss: difference of the losses, relative to the loss.
    """

    output: float
    loss: float

    def is_small(self, precision: str) -> bool:
        """Return whether the difference can be rounding; False for NaN."""
        output, loss = _BOUNDS[precision]
        return self.output <= output and self.loss <= loss

    def __str__(self) -> str:
        return f"output differs by {self.output:.1e} of its largest value, loss by {self.loss:.1e}"


def difference(found: StepOutput, reference: StepOutput) -> Difference | None:
    """Return the difference of a candidate from the reference; None if their outputs have different shapes."""
    if found.output.shape != reference.output.shape:
        return None
    largest = float(np.abs(reference.output).max())
    return Difference(
        float(np.abs(found.output - reference.output).max()) / largest, abs(found.loss / reference.loss - 1)
    )
