"""All settings of an experiment.

A folder of `megavit/` is a Hydra group in `conf/` is a field here; `run` and `train` have no folder.
"""

from dataclasses import dataclass, field

from megavit.checkpoint.config import CheckpointConfig
from megavit.config.run import RunConfig
from megavit.config.train import TrainConfig
from megavit.data.config import DataConfig
from megavit.metrics.config import MetricsConfig
from megavit.model.config import ModelConfig
from megavit.optim.config import ENCODER, OptimConfig
from megavit.parallel.config import ParallelConfig
from megavit.planner.flops import DecoderShape, NetworkShape
from megavit.task.config import TaskConfig, TaskName


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
