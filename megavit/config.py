"""The whole configuration of a run, and the checks that span its groups.

A folder of `megavit/` is a Hydra group in `conf/` is a field of `RunConfig`; `run` and `train` have no folder.
"""

from dataclasses import dataclass, field
from enum import Enum

from megavit.checkpoint.config import CheckpointConfig
from megavit.checks import require_number
from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.metrics.config import MetricsConfig
from megavit.model.config import Attention, Linears, ModelConfig
from megavit.optim.config import OptimConfig, Optimizer
from megavit.parallel.config import ParallelConfig, Recompute
from megavit.parallel.stages import plan_stages
from megavit.plan.flops import EncoderShape
from megavit.task.config import TaskConfig


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
    """What torch.compile gets: nothing, or each encoder layer as one graph without a break."""

    none = "none"
    layer = "layer"


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
class TrainSection:
    """Section `train`: how long and in what portions.

    Attributes:
        steps: optimizer steps of the whole run; or null and epochs.
        epochs: passes over the training data; or null and steps.
        global_batch: images per step, over all ranks.
        micro_batch: images that pass the model at once on one rank; null takes all of a rank's at once.
        precision: number formats.
        grad_reduce: format of gradient accumulation and reduction; bf16 halves its bytes and loses digits.
        compile: what torch.compile gets.
        eval_every: steps between evaluations of the whole validation set; null evaluates at the end alone.
        stop_at: save and leave after this step, as if signalled (exit code 75).
    """

    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 64
    micro_batch: int | None = None
    precision: Precision = Precision.fp32
    grad_reduce: GradReduce = GradReduce.fp32
    compile: Compile = Compile.none
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

    def micro_batch(self, world_size: int) -> int:
        """Images that pass the model at once on one rank."""
        if self.train.micro_batch is not None:
            return self.train.micro_batch
        return max(1, self.train.global_batch // self.parallel.data_parallel_size(world_size))

    def num_microbatches(self, world_size: int) -> int:
        """Micro batches per step and data-parallel rank."""
        portion = self.micro_batch(world_size) * self.parallel.data_parallel_size(world_size)
        return self.train.global_batch // portion

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
        falling = self.optim.decay_steps
        if falling is not None and self.optim.warmup_steps + falling > steps:
            raise ConfigError(
                f"optim.warmup_steps={self.optim.warmup_steps} + optim.decay_steps={falling} = "
                f"{self.optim.warmup_steps + falling} is more than the run's {steps} steps; lower one of them"
            )
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
        self.run.check(world_size)
        for group in (self.parallel, self.model, self.task, self.data, self.optim, self.checkpoint, self.metrics):
            group.check()
        self._check_train()
        self._check_tensor_parallel()
        self._check_batch(world_size)
        self._check_precision()
        self._check_overlap(world_size)
        plan_stages(self.parallel, self.encoder_shape(num_classes=self.data.num_classes or 0))

    def _check_train(self) -> None:
        train = self.train
        if (train.steps is None) == (train.epochs is None):
            raise ConfigError(
                f"set one of train.steps={train.steps} and train.epochs={train.epochs}, and the other to null"
            )
        require_number("train", train, "steps", "global_batch", "micro_batch", "eval_every", "stop_at", at_least=1)
        require_number("train", train, "epochs", above=0)
        if train.stop_at is not None and train.steps is not None and train.stop_at > train.steps:
            raise ConfigError(f"train.stop_at={train.stop_at} is after the last step, train.steps={train.steps}")
        if train.steps is not None:
            self._check_warmup(train.steps)
        peak = self.optim.peak_lr(train.global_batch)
        if self.optim.min_lr > peak:
            raise ConfigError(f"optim.min_lr={self.optim.min_lr} is above the peak learning rate {peak:g}; lower it")

    def _check_precision(self) -> None:
        train, model = self.train, self.model
        if train.grad_reduce is GradReduce.bf16 and train.precision is not Precision.bf16_o2:
            raise ConfigError(
                "train.grad_reduce=bf16 needs bf16 gradients, and train.precision=fp32 makes none; set "
                "train.precision=bf16_o2 or train.grad_reduce=fp32"
            )
        if model.attention in (Attention.sdpa_flash, Attention.flash_attn) and train.precision is Precision.fp32:
            raise ConfigError(
                f"model.attention={model.attention.value} computes in bf16 alone, and train.precision=fp32; set "
                f"train.precision=bf16_o2 or model.attention=sdpa"
            )
        if train.compile is Compile.layer:
            if self.parallel.tp > 1:
                raise ConfigError(
                    f"train.compile=layer makes one graph of a layer, and parallel.tp={self.parallel.tp} breaks it at "
                    f"every all-reduce; set parallel.tp=1 or train.compile=none"
                )
            if self.parallel.recompute is Recompute.selective:
                raise ConfigError(
                    "train.compile=layer and parallel.recompute=selective exclude each other: the compiler decides "
                    "itself what a layer keeps; set parallel.recompute to none or full"
                )
            if model.linears is Linears.te or model.attention in (Attention.te, Attention.flash_attn):
                raise ConfigError(
                    "train.compile=layer needs torch's own parts: set model.linears=local and model.attention to sdpa "
                    "or sdpa_flash, or train.compile=none"
                )

    def _check_overlap(self, world_size: int) -> None:
        dp = self.parallel.data_parallel_size(world_size)
        if self.parallel.overlap_grad_reduce and dp == 1:
            raise ConfigError(
                f"parallel.overlap_grad_reduce=true would be ignored: world size {world_size} leaves data-parallel "
                f"size 1, nothing is reduced; set it to false"
            )
        if self.parallel.overlap_param_gather and self.optim.name is not Optimizer.adamw:
            raise ConfigError(
                f"parallel.overlap_param_gather=true needs weights that the optimizer shards, as optim=adamw does; "
                f"optim.name={self.optim.name.value} keeps them whole: set it to false"
            )
        portions = self.num_microbatches(world_size)
        if self.parallel.vpp > 1 and portions % self.parallel.pp:
            raise ConfigError(
                f"parallel.vpp={self.parallel.vpp} needs micro batches per step in multiples of parallel.pp="
                f"{self.parallel.pp}, not train.global_batch={self.train.global_batch} / (train.micro_batch="
                f"{self.micro_batch(world_size)} × data-parallel size {dp}) = {portions}; change train.global_batch or "
                f"train.micro_batch"
            )

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
        micro = self.micro_batch(world_size)
        portion = micro * dp
        if self.train.global_batch % portion:
            near = max(1, round(self.train.global_batch / portion)) * portion
            raise ConfigError(
                f"train.global_batch={self.train.global_batch} is not a multiple of train.micro_batch="
                f"{micro} × data-parallel size {dp} = {portion}; set train.global_batch={near}, or "
                f"a train.micro_batch that divides {self.train.global_batch / dp:g}"
            )
