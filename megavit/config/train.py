"""Section `train`: length, batch and precision."""

from dataclasses import dataclass
from enum import Enum


class Precision(Enum):
    """Number formats of weights, gradients and activations.

    `bf16_o2`: weights and activations in bf16; the optimizer's weights and gradients in fp32.
    """

    fp32 = "fp32"
    bf16_o2 = "bf16_o2"


class GradReduce(Enum):
    """The format in which gradients are accumulated and reduced over the data-parallel ranks."""

    fp32 = "fp32"
    bf16 = "bf16"


class Compile(Enum):
    """What torch.compile gets: nothing, or each encoder layer as one graph without a break (not run on a GPU)."""

    none = "none"
    layer = "layer"


class OnNonfinite(Enum):
    """What happens to a step whose gradient is not finite: the run stops before it, or goes on without it."""

    stop = "stop"
    skip = "skip"


@dataclass
class TrainConfig:
    """Section `train`: length, batch and precision.

    Attributes:
        steps: optimizer steps of the whole run; or null and epochs.
        epochs: passes over the training data; or null and steps.
        global_batch: images per step, over all ranks.
        micro_batch: images that pass the model at once on one rank; null takes all of a rank's at once.
        precision: number formats.
        grad_reduce: format of gradient accumulation and reduction; bf16 halves its bytes and loses digits. Not run on a
            GPU: bf16.
        gradient_accumulation_fusion: add each product that is a weight's gradient to the step's gradients as it is
            computed; at TP 1, for the encoder layers' matrices. Not run on a GPU.
        compile: what torch.compile gets. Not run on a GPU: layer.
        eval_every: steps between evaluations of the whole validation set; null evaluates at the end alone, auto once an
            epoch and at most 50 times a run.
        on_nonfinite: what happens when a gradient is not finite.
        stop_at: save and leave after this step, as if signalled (exit code 75).
    """

    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 64
    micro_batch: int | None = None
    precision: Precision = Precision.fp32
    grad_reduce: GradReduce = GradReduce.fp32
    gradient_accumulation_fusion: bool = False
    compile: Compile = Compile.none
    eval_every: int | str | None = None
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    stop_at: int | None = None
