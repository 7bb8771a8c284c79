"""All settings of an experiment.

A Hydra group `conf/X/` is a field `X` here and a folder `megavit/X/`; `run` and `train` have no folder.
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
from megavit.planner.flops import NetworkShape
from megavit.task.config import ClassificationConfig, TaskConfig


@dataclass
class ExperimentConfig:
    """All settings of a run: one field per group.

    Attributes:
        init_from: weights that a new run starts from: a run or checkpoint, ema:RUN for its moving average, or another
            library's, as hf:FOLDER_OR_ID, timm:FILE_OR_ID, mae:FILE, nemo:FILE; a run with checkpoints of its own
            resumes from those. Position embeddings are resized to another image size; the classifier is initialised
            from scratch if the classes differ.
    """

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=ClassificationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    init_from: str | None = None

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        rows, columns = self.model.patch_grid(self.data.image_size)
        return rows * columns

    @property
    def visible_patches(self) -> int:
        """Patches per image that the encoder receives."""
        return self.task.num_visible_patches(self.num_patches)

    @property
    def encoder_tokens(self) -> int:
        """Tokens per image in the encoder: visible patches and class tokens."""
        return self.visible_patches + self.model.class_tokens

    @property
    def frozen(self) -> list[str]:
        """Patterns of the weights that stay as they are."""
        return self.optim.freeze or [] if self.task.trains_encoder else [ENCODER]

    def network_shape(self, *, num_classes: int) -> NetworkShape:
        """What the network's FLOPs depend on.

        Args:
            num_classes: classes of the data's labels.
        """
        encoder = NetworkShape(
            hidden=self.model.hidden_size,
            ffn=self.model.ffn_size,
            layers=self.model.num_layers,
            tokens=self.encoder_tokens,
            patches=self.visible_patches,
            patch_values=self.data.channels * self.model.patch_size**2,
            classes=0,
            trains_encoder=ENCODER not in self.frozen,
        )
        return self.task.network_shape(encoder, model=self.model, num_patches=self.num_patches, num_classes=num_classes)
