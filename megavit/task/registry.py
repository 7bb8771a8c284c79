"""What every task offers to the training loop."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.prefetch import RequiredFields
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig
from megavit.model.vit import EncoderStage
from megavit.parallel.activation import ActivationSpec
from megavit.parallel.config import ParallelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.plugins import import_plugin
from megavit.task.classification import ClassificationTask
from megavit.task.config import TaskConfig, TaskName
from megavit.task.linear_probe import LinearProbe
from megavit.task.mae import MaeTask
from megavit.task.monitor import MonitoredMetric

# A micro batch's output to its mean loss, for the gradient, and sums over its counted images, for the metrics.
LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Task(Protocol):
    """A network's parts, what it is given, and how its output is judged.

    Attributes:
        fields: what this rank's stage reads of a batch.
        metric_sums: what the loss function adds up; `count`, the counted images, is among them.
        metric_shapes: what `score` adds up, and in what shapes; `sums` are among them.
        baseline_samples: training images that `prepare` is to be shown; 0 for none.
        monitor: the metric that tells the best checkpoint.
        image_grid: titles of the pictures that `visualize` makes of an image; empty where there is nothing to see.
    """

    fields: RequiredFields
    metric_sums: tuple[str, ...]
    metric_shapes: Mapping[str, tuple[int, ...]]
    baseline_samples: int
    monitor: MonitoredMetric
    image_grid: tuple[str, ...]

    def build_chunks(
        self, mcore_config: TransformerConfig, *, parallel: ParallelConfig, stage_layers: list[int]
    ) -> dict[str, EncoderStage]:
        """Build this rank's stages of the network by name, on the CPU, their weights not drawn yet.

        Args:
            mcore_config: Megatron-Core's configuration of the encoder.
            parallel: the parallel group.
            stage_layers: encoder layers of each of this rank's stages.
        """
        ...

    def boundary(self, micro_batch: int, mcore_config: TransformerConfig) -> ActivationSpec:
        """What crosses from stage to stage for a micro batch of so many images."""
        ...

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Look at some training images, not augmented, before training; every rank calls this."""
        ...

    def forward(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Run one stage on a micro batch; the batch is None on stages that neither embed nor judge."""
        ...

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """What is reported of the sums over all ranks."""
        ...

    def summary(self, validation: dict[str, float]) -> str:
        """The result in a few words."""
        ...

    def evaluate_sums(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Like `forward`, but the sums are those of `metric_shapes`: what an evaluation counts beside."""
        ...

    def visualize(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Like `forward`, but with one sum: `image_grid`, uint8 [image, panel, channel, row, column]."""
        ...


def build_task(
    config: TaskConfig, *, model: ModelConfig, data: DataConfig, num_classes: int, layout: ParallelLayout, seed: int
) -> Task:
    """The task that the configuration names.

    Args:
        config: the task group.
        model: the model group.
        data: the data group.
        num_classes: of the data; a masked autoencoder does not look at labels.
        layout: this rank's place.
        seed: `run.seed`, of the masks, and of what the device erases and mixes.

    Raises:
        ConfigError: if it needs labels and there are none.
    """
    if config.name.classifies and not num_classes:
        raise ConfigError(
            f"task.name={config.name.value} needs labels, and data.source={data.source} has none in "
            f"data.path={data.path}; task=mae learns without"
        )
    builtin: dict[TaskName, Callable[..., Task]] = {
        TaskName.classify: ClassificationTask,
        TaskName.linear_probe: LinearProbe,
        TaskName.mae: MaeTask,
    }
    make = builtin[config.name]
    if config.implementation is not None:
        make = import_plugin(config.implementation, "task.implementation")
    depends_on = {"num_classes": num_classes} if config.name.classifies else {}
    return make(config, model=model, data=data, layout=layout, seed=seed, **depends_on)
