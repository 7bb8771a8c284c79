"""How weights are updated."""

from dataclasses import dataclass
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number, require_steps

# The word for all but what stands on the encoder, among the patterns of what is frozen.
ENCODER = "encoder"


class Optimizer(Enum):
    """The update rule."""

    adamw = "adamw"
    sgd = "sgd"
    lars = "lars"


class Schedule(Enum):
    """How the learning rate falls after warm-up: over all steps, not at all, or linearly over the last `decay_steps`
    (warm-up, stable, decay).
    """

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class Implementation(Enum):
    """Whose fused AdamW computes the update."""

    megavit = "megavit"
    apex = "apex"
    te = "te"


# What belongs to one update rule and is null for the others.
_TAKES = {
    Optimizer.adamw: {"betas", "eps", "implementation"},
    Optimizer.sgd: {"momentum"},
    Optimizer.lars: {"momentum", "trust_coefficient"},
}


@dataclass
class OptimConfig:
    """Group `optim`.

    Attributes:
        name: the update rule.
        implementation: whose fused AdamW; megavit's needs nothing installed. Null for other rules. Not run on a GPU:
            apex, te.
        lr: peak learning rate; or null and base_lr.
        base_lr: peak learning rate per 256 images: lr = base_lr · global_batch / 256.
        min_lr: learning rate at the last step.
        schedule: how it falls from lr to min_lr.
        decay_steps: the last steps, over which `wsd` falls; null for the others.
        warmup_steps: steps of linear warm-up from 0; auto takes 5 % of the run's steps, at most 5 epochs.
        shorten_warmup: shorten a warm-up that does not end before the run to 5 % of its steps, so that a recipe can be
            tried for a few steps; false refuses the run. Whoever types warmup_steps sets it to false.
        weight_decay: on matrices; biases, norms, class tokens and positions have none.
        betas: Adam's two; null for other rules.
        eps: Adam's; null for other rules.
        momentum: SGD's and LARS's; null for other rules.
        trust_coefficient: LARS's: a step moves a matrix by about lr times this share of its norm; null for other rules.
        layer_decay: each layer learns at this share of the rate of the layer above it, and the embedding of the first
            one's; the last norm and the head learn at the full rate. Null for one rate (arXiv 2106.08254, section A.3).
        freeze: patterns such as blocks.3.* of timm's weight names whose weights stay as they are; encoder stands for
            all but the head. Null trains everything.
        clip_grad: largest gradient norm over the whole model; 0 to not clip.
        ema: decay of a moving average of the weights, 0.9999 for example, which is evaluated too; null for none. The
            average starts from the initial weights, so the run should have at least 3 / (1 - ema) steps.
    """

    name: Optimizer = Optimizer.adamw
    implementation: Implementation | None = None
    lr: float | None = 1e-3
    base_lr: float | None = None
    min_lr: float = 0.0
    schedule: Schedule = Schedule.cosine
    decay_steps: int | None = None
    warmup_steps: int | str = 0
    shorten_warmup: bool = True
    weight_decay: float = 0.05
    betas: list[float] | None = None
    eps: float | None = None
    momentum: float | None = None
    trust_coefficient: float | None = None
    layer_decay: float | None = None
    freeze: list[str] | None = None
    clip_grad: float = 1.0
    ema: float | None = None

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after warm-up, with whichever of lr and base_lr is set."""
        if self.base_lr is not None:
            return self.base_lr * global_batch / 256
        assert self.lr is not None
        return self.lr

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        if (self.lr is None) == (self.base_lr is None):
            raise ConfigError(f"set one of optim.lr={self.lr} and optim.base_lr={self.base_lr}, and the other to null")
        require_number("optim", self, "lr", "base_lr", "min_lr", "weight_decay", "clip_grad", at_least=0)
        require_steps("optim", self, "warmup_steps", at_least=0)
        require_number("optim", self, "eps", "trust_coefficient", "layer_decay", above=0)
        if self.freeze == []:
            raise ConfigError("optim.freeze=[] freezes nothing; null says so")
        if self.layer_decay is not None and self.layer_decay >= 1:
            raise ConfigError(
                f"optim.layer_decay={self.layer_decay} must be below 1, for lower layers to learn more slowly; null is "
                f"one rate for all"
            )
        require_number("optim", self, "momentum", "ema", at_least=0, below=1)
        takes = _TAKES[self.name]
        for key in sorted(set().union(*_TAKES.values())):
            value = getattr(self, key)
            if key in takes and value is None:
                raise ConfigError(f"optim.name={self.name.value} needs optim.{key}; choose optim={self.name.value}")
            if key not in takes and value is not None:
                raise ConfigError(
                    f"optim.{key}={value} would be ignored by optim.name={self.name.value}; set it to null"
                )
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        require_number("optim", self, "decay_steps", at_least=1)
        if (self.schedule is Schedule.wsd) != (self.decay_steps is not None):
            raise ConfigError(
                f"optim.schedule={self.schedule.value} with optim.decay_steps={self.decay_steps}: wsd needs the "
                "number of "
                f"steps it falls over, the others have none"
            )
        if self.schedule is Schedule.constant and self.min_lr:
            raise ConfigError(f"optim.min_lr={self.min_lr} would be ignored by optim.schedule=constant; set it to 0")
