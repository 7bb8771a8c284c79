"""Everything that a run depends on, and the numbers that follow from it.

A folder of `megavit/` is a Hydra group in `conf/` is a field here; `run` and `train` have no folder.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from megavit.checkpoint.config import CheckpointConfig
from megavit.config.train import RunConfig, TrainConfig
from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.metrics.config import MetricsConfig
from megavit.model.config import ModelConfig
from megavit.optim.config import ENCODER, OptimConfig
from megavit.parallel.config import ParallelConfig
from megavit.planner.flops import DecoderShape, NetworkShape
from megavit.task.config import TaskConfig, TaskName
from megavit.validation import AUTO

# What auto stands for: this many evaluations and saves at most; warm-up over 1 / 20 of the steps and at most 5 epochs.
_MOST_EVALUATIONS = 50
_WARMUP_DIVISOR = 20
_WARMUP_EPOCHS = 5


@dataclass(frozen=True)
class Pace:
    """Step counts of a run once its data are known: the settings, with a number in the place of `auto`.

    Attributes:
        warmup_steps: steps of linear warm-up.
        eval_every: steps between evaluations; None evaluates at the end alone.
        save_every: steps between saves; None saves at the end alone.
    """

    warmup_steps: int
    eval_every: int | None
    save_every: int | None


@dataclass
class ExperimentConfig:
    """Everything a run depends on: the groups, and

    Attributes:
        init_from: whose weights a new run starts from: a run or checkpoint, ema:RUN for its moving average, or another
            library's, as hf:FOLDER_OR_ID, timm:FILE_OR_ID, mae:FILE, nemo:FILE; once it has checkpoints of its own it
            goes on from those. Positions are resized where images have another size, the classifier is drawn anew where
            the classes are others.
    """

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    init_from: str | None = None

    @property
    def num_patches(self) -> int:
        """Patches that an image is cut into."""
        rows, columns = self.model.patch_grid(self.data.image_size)
        return rows * columns

    @property
    def visible_patches(self) -> int:
        """Patches of an image that the encoder sees."""
        patches = self.num_patches
        return self.task.num_visible_patches(patches) if self.task.name is TaskName.mae else patches

    @property
    def encoder_tokens(self) -> int:
        """Tokens of an image in the encoder: the patches it sees and the class tokens."""
        return self.visible_patches + self.model.class_tokens

    @property
    def frozen(self) -> list[str]:
        """Patterns of the weights that stay as they are."""
        return [ENCODER] if self.task.name is TaskName.linear_probe else self.optim.freeze or []

    def network_shape(self, *, num_classes: int) -> NetworkShape:
        """What the network's FLOPs depend on.

        Args:
            num_classes: of a classifier; a masked autoencoder has none.
        """
        decoder = None
        if self.task.name is TaskName.mae:
            sizes = (self.task.decoder_hidden_size, self.task.decoder_ffn_size, self.task.decoder_num_layers)
            hidden, ffn, layers = (size or 0 for size in sizes)
            decoder = DecoderShape(hidden, ffn, layers, tokens=self.num_patches + self.model.class_tokens)
        return NetworkShape(
            hidden=self.model.hidden_size,
            ffn=self.model.ffn_size,
            layers=self.model.num_layers,
            tokens=self.encoder_tokens,
            patches=self.visible_patches,
            patch_values=self.data.channels * self.model.patch_size**2,
            classes=num_classes if decoder is None else 0,
            decoder=decoder,
            trains_encoder=ENCODER not in self.frozen,
        )

    def micro_batch(self, world_size: int) -> int:
        """Images that pass the model at once on one rank."""
        if self.train.micro_batch is not None:
            return self.train.micro_batch
        return max(1, self.train.global_batch // self.parallel.data_parallel_size(world_size))

    def num_microbatches(self, world_size: int) -> int:
        """Micro batches per step and data-parallel rank."""
        portion = self.micro_batch(world_size) * self.parallel.data_parallel_size(world_size)
        return self.train.global_batch // portion

    def num_images(self, num_samples: int) -> int:
        """Images of the whole run, where its length is set in epochs.

        Args:
            num_samples: of the training data.
        """
        # As typed: the float nearest to 1.1 is above it, and would ask for one image more.
        return math.ceil(Fraction(str(self.train.epochs)) * num_samples)

    def num_steps(self, num_samples: int, *, step: int = 0, consumed_samples: int = 0) -> int:
        """Optimizer steps of the whole run, with whichever of steps and epochs is set.

        Epochs are images: a run that goes on with another batch takes as many steps as the images that are left need.

        Args:
            num_samples: of the training data.
            step: steps done, of any batch.
            consumed_samples: images that they took.

        Raises:
            ConfigError: if warm-up would not end before the run does.
        """
        if self.train.steps is not None:
            steps = self.train.steps
        else:
            left = max(0, self.num_images(num_samples) - consumed_samples)
            steps = step + math.ceil(left / self.train.global_batch)
        self.check_warmup(steps)
        return steps

    def pace(self, num_steps: int, *, num_samples: int) -> Pace:
        """When the run warms up, evaluates and saves.

        Args:
            num_steps: of the whole run.
            num_samples: of the training data.
        """
        epoch = -(-num_samples // self.train.global_batch)
        often = min(max(epoch, -(-num_steps // _MOST_EVALUATIONS)), num_steps)
        eval_every, save_every = self.train.eval_every, self.checkpoint.save_every
        if self.data.val_fraction == 0:
            eval_every = None
        return Pace(
            self._warmup_steps(num_steps, num_samples),
            eval_every=often if isinstance(eval_every, str) else eval_every,
            save_every=often if isinstance(save_every, str) else save_every,
        )

    def _warmup_steps(self, num_steps: int, num_samples: int) -> int:
        warmup, falling = self.optim.warmup_steps, self.optim.decay_steps or 0
        if not isinstance(warmup, str) and warmup < num_steps and warmup + falling <= num_steps:
            return warmup
        short = min(num_steps // _WARMUP_DIVISOR, num_steps - falling)
        return min(short, _WARMUP_EPOCHS * num_samples // self.train.global_batch) if warmup == AUTO else short

    def check_warmup(self, steps: int) -> None:
        """Raise ConfigError if warm-up and decay do not fit into a run of this many steps."""
        warmup, falling = self.optim.warmup_steps, self.optim.decay_steps or 0
        if falling > steps:
            raise ConfigError(f"optim.decay_steps={falling} is more than the run's {steps} steps; lower it")
        if isinstance(warmup, str) or self.optim.shorten_warmup:
            return
        if falling and warmup + falling > steps:
            sum_of = f"optim.warmup_steps={warmup} + optim.decay_steps={falling} = {warmup + falling}"
            raise ConfigError(f"{sum_of} is more than the run's {steps} steps; lower one of them")
        if warmup >= steps:
            raise ConfigError(
                f"optim.warmup_steps={warmup} must be below the run's {steps} steps; lower it or raise train.steps or "
                f"train.epochs"
            )
