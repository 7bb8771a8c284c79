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
    """What torch.compile compiles: nothing, or each encoder layer as one graph (not run on a GPU)."""

    none = "none"
    layer = "layer"


class OnNonfinite(Enum):
    """What happens at a step with a gradient that is not finite: the run stops, or skips the step."""

    stop = "stop"
    skip = "skip"


@dataclass
class TrainConfig:
    """Section `train`: length, batch and precision.

    Attributes:
        steps: optimizer steps of the run; or null and epochs.
        epochs: passes over the training data; or null and steps.
        global_batch: images per step, over all ranks.
        micro_batch: images per micro batch on one rank; null makes one micro batch of all of a rank's images.
        precision: number formats.
        grad_reduce: format of gradient accumulation and reduction; bf16 halves the bytes and loses precision. Not run
            on a GPU: bf16.
        gradient_accumulation_fusion: accumulate weight gradients inside the matrix product, without a temporary tensor;
            at TP 1, for the encoder layers' matrices. Not run on a GPU.
        compile: what torch.compile compiles. Not run on a GPU: layer.
        eval_every: steps between evaluations of the whole validation set; null evaluates at the end only, auto once an
            epoch and at most 50 times a run.
        on_nonfinite: what happens when a gradient is not finite.
        stop_at: save and exit after this step, as after a signal (exit code 75).
        callbacks: package.module:name of functions, or of classes with a method on_step_end, that are called at the end
            of each step.
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
    callbacks: list[str] | None = None
