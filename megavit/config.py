"""The whole configuration of a run, and the checks that span its groups.

A folder of `megavit/` is a Hydra group in `conf/` is a field of `RunConfig`; `run` and `train` have no folder.
"""

from dataclasses import dataclass, field
from enum import Enum

from megavit.checkpoint.config import CheckpointConfig
from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.metrics.config import MetricsConfig
from megavit.model.config import ModelConfig
from megavit.optim.config import OptimConfig
from megavit.parallel.config import ParallelConfig
from megavit.plan.flops import EncoderShape
from megavit.task.config import TaskConfig


class Precision(Enum):
    """Number formats of weights, gradients and activations."""

    fp32 = "fp32"


@dataclass
class RunSection:
    """Section `run`: the run itself.

    Attributes:
        name: names the run; its folder derives from it, so that all ranks and every restart agree.
        dir: the run's folder.
        seed: of initial weights, data order, augmentation and dropout.
        ranks: processes that `megavit train` starts; null: one per GPU, without GPUs tp · pp.
        timeout_s: seconds after which a collective that waits for a lost rank fails.
    """

    name: str = "run"
    dir: str = "runs/${run.name}"
    seed: int = 0
    ranks: int | None = None
    timeout_s: float = 600.0


@dataclass
class TrainSection:
    """Section `train`: how long and in what portions.

    Attributes:
        steps: optimizer steps of the whole run; or null and epochs.
        epochs: passes over the training data; or null and steps.
        global_batch: images per step, over all ranks.
        micro_batch: images that pass the model at once on one rank.
        precision: number formats.
        eval_every: steps between evaluations of the whole validation set; null evaluates at the end alone.
        stop_at: save and leave after this step, as if signalled (exit code 75).
    """

    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 64
    micro_batch: int = 64
    precision: Precision = Precision.fp32
    eval_every: int | None = None
    stop_at: int | None = None


@dataclass
class RunConfig:
    """Everything a run depends on."""

    run: RunSection = field(default_factory=RunSection)
    train: TrainSection = field(default_factory=TrainSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def encoder_shape(self, *, num_classes: int) -> EncoderShape:
        """What the encoder's FLOPs depend on."""
        rows, columns = self.model.patch_grid(self.data.image_size)
        return EncoderShape(
            hidden=self.model.hidden_size,
            ffn=self.model.ffn_size,
            layers=self.model.num_layers,
            tokens=self.model.num_tokens(self.data.image_size),
            patches=rows * columns,
            patch_values=self.data.channels * self.model.patch_size**2,
            classes=num_classes,
        )

    def num_microbatches(self, world_size: int) -> int:
        """Micro batches per step and data-parallel rank."""
        return self.train.global_batch // (self.train.micro_batch * self.parallel.data_parallel_size(world_size))

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run, with whichever of steps and epochs is set.

        Args:
            num_samples: of the training data.

        Raises:
            ConfigError: if warm-up would not end before the run does.
        """
        if self.train.steps is not None:
            steps = self.train.steps
        else:
            assert self.train.epochs is not None
            steps = max(1, -int(-self.train.epochs * num_samples // self.train.global_batch))
        self._check_warmup(steps)
        return steps

    def _check_warmup(self, steps: int) -> None:
        if self.optim.warmup_steps >= steps:
            raise ConfigError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below the run's {steps} steps; lower it or "
                f"raise train.steps or train.epochs"
            )

    def check(self, world_size: int) -> None:
        """Refuse what cannot run in a world of this size.

        Raises:
            ConfigError: with the setting, the arithmetic and the way out.
        """
        for group in (self.parallel, self.model, self.task, self.data, self.optim, self.checkpoint, self.metrics):
            group.check()
        self._check_train()
        self._check_tensor_parallel()
        self._check_batch(world_size)

    def _check_train(self) -> None:
        train = self.train
        if (train.steps is None) == (train.epochs is None):
            raise ConfigError(
                f"set one of train.steps={train.steps} and train.epochs={train.epochs}, and the other to null"
            )
        for key in ("steps", "epochs", "global_batch", "micro_batch", "eval_every", "stop_at"):
            value = getattr(train, key)
            if value is not None and value <= 0:
                raise ConfigError(f"train.{key}={value} must be positive")
        if not self.run.name or "/" in self.run.name:
            raise ConfigError(f"run.name={self.run.name!r} must be a word without a slash; run.dir takes a path")
        if train.steps is not None:
            self._check_warmup(train.steps)
        peak = self.optim.peak_lr(train.global_batch)
        if self.optim.min_lr > peak:
            raise ConfigError(f"optim.min_lr={self.optim.min_lr} is above the peak learning rate {peak:g}; lower it")

    def _check_tensor_parallel(self) -> None:
        tp = self.parallel.tp
        for key in ("num_heads", "ffn_size"):
            value = getattr(self.model, key)
            if value % tp:
                fits = [
                    size for size in range(tp, 0, -1) if self.model.num_heads % size == 0 == self.model.ffn_size % size
                ]
                raise ConfigError(
                    f"model.{key}={value} is not divided by parallel.tp={tp}: {value} mod {tp} = {value % tp}; "
                    f"set parallel.tp={fits[0]}, or change model.{key}"
                )
        tokens = self.model.num_tokens(self.data.image_size)
        if self.parallel.sequence_parallel and tokens % tp:
            patches = tokens - self.model.class_tokens
            others = [count for count in (0, 1, 8) if (patches + count) % tp == 0]
            ways = [f"model.class_tokens={count} ({patches} + {count} = {patches + count})" for count in others]
            raise ConfigError(
                f"parallel.sequence_parallel=true splits {patches} patches + {self.model.class_tokens} class tokens = "
                f"{tokens} tokens over parallel.tp={tp} ranks: {tokens} mod {tp} = {tokens % tp}; "
                f"set {' or '.join([*ways, 'parallel.sequence_parallel=false'])}, or change data.image_size"
            )

    def _check_batch(self, world_size: int) -> None:
        dp = self.parallel.data_parallel_size(world_size)
        portion = self.train.micro_batch * dp
        if self.train.global_batch % portion:
            near = max(1, round(self.train.global_batch / portion)) * portion
            raise ConfigError(
                f"train.global_batch={self.train.global_batch} is not a multiple of train.micro_batch="
                f"{self.train.micro_batch} × data-parallel size {dp} = {portion}; set train.global_batch={near}, or "
                f"a train.micro_batch that divides {self.train.global_batch / dp:g}"
            )
