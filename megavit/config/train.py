"""The two sections of a run's configuration that have no folder: `run` and `train`."""

from dataclasses import dataclass
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number


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
class RunConfig:
    """Section `run`: the run itself.

    Attributes:
        name: names the run; its folder derives from it, so that all ranks and every restart agree.
        dir: the run's folder.
        seed: of initial weights, data order, augmentation and dropout.
        ranks: processes that `megavit train` starts; null: one per GPU, without GPUs tp · pp.
        preflight: rehearse at the real layout before the long part: one step, one evaluation batch, one save and load;
            null rehearses where there are several ranks.
        timeout_s: seconds after which a collective that waits for a lost rank fails.
    """

    name: str = "run"
    dir: str = "runs/${run.name}"
    seed: int = 0
    ranks: int | None = None
    preflight: bool | None = None
    timeout_s: float = 600.0

    def check(self, world_size: int) -> None:
        """Raise ConfigError where this section contradicts itself or the world it runs in."""
        require_number("run", self, "ranks", at_least=1)
        # Megatron-Core counts its groups' time-out in whole minutes.
        require_number("run", self, "timeout_s", at_least=60)
        require_number("run", self, "seed", at_least=0)
        if self.ranks is not None and self.ranks != world_size:
            raise ConfigError(
                f"run.ranks={self.ranks} would be ignored: another launcher has started {world_size} ranks; leave "
                f"run.ranks away"
            )
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"run.name={self.name!r} must be a word without a slash; run.dir takes a path")
        if not self.dir:
            raise ConfigError("run.dir is empty; leave it away to take runs/NAME")


@dataclass
class TrainConfig:
    """Section `train`: how long and in what portions.

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
