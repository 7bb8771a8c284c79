"""Settings of the optimizer, its learning-rate schedule and the moving average of the weights."""

import difflib
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from megavit.errors import ConfigError
from megavit.optim.registry import OPTIMIZERS, rule_settings
from megavit.plugins import check_name, is_plugin
from megavit.validation import format_value, require_number, require_steps

# The pattern of optim.freeze that means all weights except those of the head.
ENCODER = "encoder"


class Schedule(Enum):
    """The shape of the learning rate after warm-up.

    `cosine` and `linear` fall over all steps; `constant` does not fall; `wsd` (warm-up, stable, decay) falls linearly
    over the last `decay_steps`.
    """

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class Implementation(Enum):
    """The fused AdamW kernel that computes the update."""

    megavit = "megavit"
    apex = "apex"
    te = "te"


@dataclass
class OptimConfig:
    """Group `optim`.

    Attributes:
        name: adamw, sgd or lars; or package.module:Class, a user's torch.optim.Optimizer (see docs/extending.md).
        implementation: the fused AdamW kernel; megavit's needs no further package. Null for other optimizers. Not run
            on a GPU: apex, te.
        lr: peak learning rate; null if base_lr is set.
        base_lr: peak learning rate per 256 images: lr = base_lr · global_batch / 256.
        min_lr: learning rate at the last step.
        schedule: how the learning rate falls from lr to min_lr.
        decay_steps: number of last steps over which `wsd` falls; null for the other schedules.
        warmup_steps: steps of linear warm-up from 0; auto takes 5 % of the run's steps, at most 5 epochs.
        shorten_warmup: shorten a warm-up that is longer than the run to 5 % of the run's steps, so that a recipe can be
            tried for a few steps; false refuses the run. If warmup_steps is typed, it is false by default.
        weight_decay: weight decay of matrices; biases, norms, class tokens and position embeddings have none.
        betas: decay rates of Adam's two moments; null for other optimizers.
        eps: added to the root of Adam's second moment; null for other optimizers.
        momentum: momentum of SGD and LARS; null for other optimizers.
        trust_coefficient: under LARS a step moves a matrix by about lr times this fraction of its norm; null for
            other optimizers.
        layer_decay: factor of each layer's learning rate relative to the layer above it, and of the embedding's
            relative to the first layer; the last norm and the head have the full rate. Null gives all weights one rate
            (arXiv 2106.08254, section A.3).
        freeze: patterns of timm's weight names, such as blocks.3.*; matching weights are not trained. `encoder` matches
            all weights except the head's. Null trains all weights.
        clip_grad: largest norm of the full model's gradient; 0 disables clipping.
        ema: decay of a moving average of the weights, for example 0.9999, which is evaluated too; null for none. The
            average starts from the initial weights, so the run should have at least 3 / (1 - ema) steps.
    """

    name: str = "adamw"
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
        """Return the learning rate after warm-up, from lr or base_lr."""
        if self.base_lr is not None:
            return self.base_lr * global_batch / 256
        assert self.lr is not None
        return self.lr

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        if (self.lr is None) == (self.base_lr is None):
            raise ConfigError(f"set one of optim.lr={self.lr} and optim.base_lr={self.base_lr}, and the other to null")
        require_number("optim", self, "lr", "base_lr", "min_lr", "weight_decay", "clip_grad", at_least=0)
        require_steps("optim", self, "warmup_steps", at_least=0)
        require_number("optim", self, "eps", "trust_coefficient", "layer_decay", above=0)
        if self.freeze == []:
            raise ConfigError("optim.freeze=[] freezes nothing; set it to null")
        if self.layer_decay is not None and self.layer_decay >= 1:
            raise ConfigError(
                f"optim.layer_decay={self.layer_decay} must be below 1, so that lower layers learn more slowly; set it "
                f"to null for one learning rate"
            )
        require_number("optim", self, "momentum", "ema", at_least=0, below=1)
        self._check_name()
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        require_number("optim", self, "decay_steps", at_least=1)
        if (self.schedule is Schedule.wsd) != (self.decay_steps is not None):
            raise ConfigError(
                f"optim.schedule={self.schedule.value} with optim.decay_steps={self.decay_steps}: wsd needs the "
                f"number of steps over which it falls, the other schedules need null"
            )
        if self.schedule is Schedule.constant and self.min_lr:
            raise ConfigError(f"optim.min_lr={self.min_lr} would be ignored by optim.schedule=constant; set it to 0")

    def _check_name(self) -> None:
        if is_plugin(self.name):
            # `inspect_plugin` checks the settings once the class is imported.
            check_name(self.name, "optim.name")
            return
        if self.name not in OPTIMIZERS:
            near = difflib.get_close_matches(self.name, OPTIMIZERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OPTIMIZERS)}, or package.module:Class"
            raise ConfigError(f"optim.name={self.name} is not known; {hint}")
        takes = OPTIMIZERS[self.name].settings
        for key in sorted(takes):
            if getattr(self, key) is None:
                raise ConfigError(f"optim.name={self.name} needs optim.{key}; choose optim={self.name}")
        self.refuse_ignored(takes)

    def refuse_ignored(self, takes: Container[str]) -> None:
        """Raise ConfigError if a setting of another optimizer is set.

        Args:
            takes: settings that this optimizer has.
        """
        for key in sorted(rule_settings()):
            value = getattr(self, key)
            if key not in takes and value is not None:
                raise ConfigError(
                    f"optim.{key}={format_value(value)} would be ignored by optim.name={self.name}; set it to null"
                )

    def keywords(self, settings: Iterable[str]) -> dict[str, Any]:
        """Return an optimizer's settings as keyword arguments of its class; null leaves the class's default."""
        values = {key: getattr(self, key) for key in settings if key != "implementation"}
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if value is not None
        }


def without_optimizer(config: OptimConfig) -> OptimConfig:
    """Return the group with megavit's AdamW for any optimizer: an evaluation needs none and imports no plug-in."""
    cleared: dict[str, Any] = dict.fromkeys(rule_settings())
    adamw = {"name": "adamw", "implementation": Implementation.megavit, "betas": [0.9, 0.999], "eps": 1e-8}
    return replace(config, **(cleared | adamw))
