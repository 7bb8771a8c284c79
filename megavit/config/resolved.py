"""Numbers that follow from a configuration, the number of ranks and the training data, computed once for a run."""

import math
from dataclasses import dataclass
from fractions import Fraction

from megavit.config.experiment import ExperimentConfig
from megavit.errors import ConfigError
from megavit.parallel.stages import plan_stages
from megavit.planner.flops import NetworkShape
from megavit.validation import AUTO

# What auto means: this many evaluations and saves at most; warm-up over 1 / 20 of the steps and at most 5 epochs.
_MOST_EVALUATIONS = 50
_WARMUP_DIVISOR = 20
_WARMUP_EPOCHS = 5


@dataclass(frozen=True)
class Pace:
    """When a run warms up, evaluates and saves: the settings, with a number in the place of `auto`.

    Attributes:
        warmup_steps: steps of linear warm-up.
        eval_every: steps between evaluations; None evaluates at the end only.
        save_every: steps between saves; None saves at the end only.
    """

    warmup_steps: int
    eval_every: int | None
    save_every: int | None


@dataclass(frozen=True)
class ResolvedStep:
    """One optimizer step on a given number of ranks.

    Attributes:
        num_classes: classes of the data; a masked autoencoder ignores them.
        micro_batch: images per micro batch on one rank.
        num_microbatches: micro batches per step on one data-parallel rank.
        peak_lr: learning rate after warm-up.
        shape: sizes that the network's FLOPs depend on.
        stages: encoder layers of each pipeline stage.
    """

    num_classes: int
    micro_batch: int
    num_microbatches: int
    peak_lr: float
    shape: NetworkShape
    stages: list[int]


@dataclass(frozen=True)
class ResolvedRun(ResolvedStep):
    """A run on given training data: its step, its length and its pace.

    Attributes:
        num_steps: optimizer steps of the run.
        num_samples: training images.
        pace: when the run warms up, evaluates and saves.
    """

    num_steps: int
    num_samples: int
    pace: Pace


def resolve_step(config: ExperimentConfig, world_size: int, *, num_classes: int) -> ResolvedStep:
    """Resolve what one step is, without training data: to evaluate, convert or time a network.

    Args:
        config: checked against the world size.
        world_size: number of ranks.
        num_classes: classes of the data.
    """
    shape = config.network_shape(num_classes=num_classes)
    return ResolvedStep(
        num_classes=num_classes,
        micro_batch=resolve_micro_batch(config, world_size),
        num_microbatches=resolve_num_microbatches(config, world_size),
        peak_lr=config.optim.peak_lr(config.train.global_batch),
        shape=shape,
        stages=plan_stages(config.parallel, shape),
    )


def resolve_run(
    config: ExperimentConfig,
    world_size: int,
    *,
    num_classes: int,
    num_samples: int,
    step: int = 0,
    consumed_samples: int = 0,
) -> ResolvedRun:
    """Resolve a run.

    Args:
        config: checked against the world size.
        world_size: number of ranks.
        num_classes: classes of the training data.
        num_samples: training images.
        step: steps already done, with any batch size.
        consumed_samples: images that they took.

    Raises:
        ConfigError: if warm-up would not end before the run does.
    """
    num_steps = resolve_num_steps(config, num_samples, step=step, consumed_samples=consumed_samples)
    one_step = resolve_step(config, world_size, num_classes=num_classes)
    return ResolvedRun(
        **vars(one_step),
        num_steps=num_steps,
        num_samples=num_samples,
        pace=resolve_pace(config, num_steps, num_samples=num_samples),
    )


def resolve_micro_batch(config: ExperimentConfig, world_size: int) -> int:
    """Return the images per micro batch on one rank."""
    if config.train.micro_batch is not None:
        return config.train.micro_batch
    return max(1, config.train.global_batch // config.parallel.data_parallel_size(world_size))


def resolve_num_microbatches(config: ExperimentConfig, world_size: int) -> int:
    """Return the micro batches per step on one data-parallel rank."""
    dp = config.parallel.data_parallel_size(world_size)
    return config.train.global_batch // (resolve_micro_batch(config, world_size) * dp)


def resolve_num_images(config: ExperimentConfig, num_samples: int) -> int:
    """Return the images of the run, where its length is set in epochs.

    Args:
        config: the run's.
        num_samples: training images.
    """
    # As typed: the float nearest to 1.1 is above it, and would add one image.
    return math.ceil(Fraction(str(config.train.epochs)) * num_samples)


def resolve_num_steps(config: ExperimentConfig, num_samples: int, *, step: int = 0, consumed_samples: int = 0) -> int:
    """Return the optimizer steps of the run, from whichever of steps and epochs is set.

    Epochs count images: a run that resumes with another batch size takes as many steps as the remaining images need.

    Args:
        config: the run's.
        num_samples: training images.
        step: steps already done, with any batch size.
        consumed_samples: images that they took.

    Raises:
        ConfigError: if warm-up would not end before the run does.
    """
    if config.train.steps is not None:
        steps = config.train.steps
    else:
        left = max(0, resolve_num_images(config, num_samples) - consumed_samples)
        steps = step + math.ceil(left / config.train.global_batch)
    check_warmup(config, steps)
    return steps


def resolve_pace(config: ExperimentConfig, num_steps: int, *, num_samples: int) -> Pace:
    """Return when the run warms up, evaluates and saves.

    Args:
        config: the run's.
        num_steps: of the run.
        num_samples: training images.
    """
    epoch = -(-num_samples // config.train.global_batch)
    often = min(max(epoch, -(-num_steps // _MOST_EVALUATIONS)), num_steps)
    eval_every, save_every = config.train.eval_every, config.checkpoint.save_every
    if config.data.val_fraction == 0:
        eval_every = None
    return Pace(
        _warmup_steps(config, num_steps, num_samples),
        eval_every=often if isinstance(eval_every, str) else eval_every,
        save_every=often if isinstance(save_every, str) else save_every,
    )


def _warmup_steps(config: ExperimentConfig, num_steps: int, num_samples: int) -> int:
    warmup, falling = config.optim.warmup_steps, config.optim.decay_steps or 0
    if not isinstance(warmup, str) and warmup < num_steps and warmup + falling <= num_steps:
        return warmup
    short = min(num_steps // _WARMUP_DIVISOR, num_steps - falling)
    return min(short, _WARMUP_EPOCHS * num_samples // config.train.global_batch) if warmup == AUTO else short


def check_warmup(config: ExperimentConfig, steps: int) -> None:
    """Raise ConfigError if warm-up and decay do not fit into a run of this many steps."""
    warmup, falling = config.optim.warmup_steps, config.optim.decay_steps or 0
    if falling > steps:
        raise ConfigError(f"optim.decay_steps={falling} is more than the run's {steps} steps; lower it")
    if isinstance(warmup, str) or config.optim.shorten_warmup:
        return
    if falling and warmup + falling > steps:
        sum_of = f"optim.warmup_steps={warmup} + optim.decay_steps={falling} = {warmup + falling}"
        raise ConfigError(f"{sum_of} is more than the run's {steps} steps; lower one of them")
    if warmup >= steps:
        raise ConfigError(
            f"optim.warmup_steps={warmup} must be below the run's {steps} steps; lower it or raise train.steps or "
            f"train.epochs"
        )
