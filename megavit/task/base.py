"""The base class of tasks: the interface between a task and the training loop, with defaults."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.prefetch import RequiredFields
from megavit.metrics.task_metric import TaskMetric
from megavit.model.config import ModelConfig
from megavit.model.vit import EncoderStage, Stage
from megavit.parallel.activation import ActivationSpec, tokens_boundary
from megavit.parallel.config import ParallelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.task.config import TaskConfig

# Maps a micro batch's output to its mean loss, for the gradient, and to sums over its counted images, for the metrics.
LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class MonitoredMetric:
    """The metric that selects the best checkpoint, and its direction.

    Attributes:
        metric: its name among the task's metrics.
        higher: whether a larger value is better.
    """

    metric: str
    higher: bool

    def name_in(self, found: Mapping[str, float]) -> str:
        """Return the metric's name in an evaluation: that of the averaged weights, where there is one."""
        return f"ema_{self.metric}" if f"ema_{self.metric}" in found else self.metric

    def is_better(self, found: dict[str, float], than: dict[str, float]) -> bool:
        """Return whether an evaluation is better than the best one so far.

        With a moving average of the weights, the average's value counts.

        Args:
            found: metrics of the evaluation.
            than: metrics of the best evaluation so far; empty if there is none.
        """
        name = self.name_in(found)
        # A missing value is worse than every value, and so is NaN, which compares false with all.
        if name not in found or name not in than:
            return name in found and found[name] == found[name]
        return found[name] > than[name] if self.higher else found[name] < than[name]


class Task:
    """The network of a task, the fields of a batch that it reads, its loss and its metrics.

    A subclass defines `build_chunks` and `forward`. All other members have defaults, for a task that sends all tokens
    from stage to stage and reports its mean loss.

    Args:
        config: the task group.
        model: the model group.
        data: the data group.
        num_classes: classes of the data's labels; 0 without labels.
        layout: this rank's place.
        seed: `run.seed`.

    Attributes:
        fields: fields of a batch that this rank's stage reads.
        metric_sums: names of the sums that the loss function returns; `count`, the counted images, is among them.
        metric_shapes: names and shapes of the sums that `evaluate_sums` returns; `metric_sums` are among them.
        reported: metrics other than the loss, in the console's order; the first one selects the best checkpoint.
        targets: names of the targets that the loss reads, on the last stage.
        baseline_samples: training images that `prepare` reads; 0 for none.
        image_grid: titles of the pictures that `visualize` makes per image; empty for a task without pictures.
    """

    metric_sums: tuple[str, ...] = ("loss", "count")
    reported: tuple[TaskMetric, ...] = ()
    targets: tuple[str, ...] = ()
    baseline_samples = 0
    image_grid: tuple[str, ...] = ()

    def __init__(
        self,
        config: TaskConfig,
        *,
        model: ModelConfig,
        data: DataConfig,
        num_classes: int,
        layout: ParallelLayout,
        seed: int,
    ) -> None:
        self.config, self.model, self.data, self.layout, self.seed = config, model, data, layout, seed
        self.num_classes = num_classes
        self.fields = RequiredFields(
            images=layout.holds_first_stage, targets=self.targets if layout.holds_last_stage else ()
        )
        self.metric_shapes: Mapping[str, tuple[int, ...]] = dict.fromkeys(self.metric_sums, ())

    @property
    def monitor(self) -> MonitoredMetric:
        """Return the metric that selects the best checkpoint: the first of `reported`, else the loss."""
        if not self.reported:
            return MonitoredMetric("loss", higher=False)
        return MonitoredMetric(self.reported[0].name, higher=self.reported[0].higher)

    def build_chunks(
        self, mcore_config: TransformerConfig, *, parallel: ParallelConfig, stage_layers: list[int]
    ) -> dict[str, EncoderStage]:
        """Build this rank's stages of the network on the CPU, without initialising their weights.

        Args:
            mcore_config: Megatron-Core's configuration of the encoder.
            parallel: the parallel group.
            stage_layers: encoder layers of each of this rank's stages.

        Returns:
            The stages by the names of `build_model_chunks`.
        """
        raise NotImplementedError

    def boundary(self, micro_batch: int, mcore_config: TransformerConfig) -> ActivationSpec:
        """Return the tensors that one stage sends to the next for a micro batch: by default all tokens.

        Args:
            micro_batch: images per micro batch.
            mcore_config: Megatron-Core's configuration of the encoder.
        """
        return tokens_boundary(self.model.num_tokens(self.data.image_size), micro_batch, mcore_config)

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Read `baseline_samples` training images before training; every rank calls this.

        Args:
            batches: micro batches of this rank, not augmented.
        """

    def forward(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Run one stage on a micro batch.

        Args:
            batch: the micro batch; None on stages that read none of its fields.
            model: this rank's stage.

        Returns:
            The stage's output, and the function that computes the loss from it, which only the last stage calls.
        """
        raise NotImplementedError

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Return the metrics: by default the mean of each sum over the counted images.

        Args:
            totals: the sums of `metric_sums` over all ranks.
        """
        return {name: totals[name] / totals["count"] for name in self.metric_sums if name != "count"}

    def summary(self, validation: dict[str, float]) -> str:
        """Describe the result in a few words.

        Args:
            validation: metrics of the last evaluation.
        """
        return f"validation loss {validation['loss']:.4f}"

    def evaluate_sums(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Run `forward` for `megavit evaluate`; the loss function returns the sums of `metric_shapes`.

        Args:
            batch, model: see `forward`.
        """
        return self.forward(batch, model)

    def visualize(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Run `forward`; the loss function returns `image_grid`, uint8 [image, panel, channel, row, column].

        Args:
            batch, model: see `forward`.
        """
        raise AssertionError(f"{type(self).__name__} makes no pictures")


def build_model_chunks(
    build: Callable[[Stage], EncoderStage], *, parallel: ParallelConfig, data: DataConfig, stage_layers: list[int]
) -> dict[str, EncoderStage]:
    """Build each of this rank's stages, by the names that Megatron-Core's optimizer expects.

    Args:
        build: function that builds one stage of the network.
        parallel: the parallel group.
        data: the data group, for the shape of images.
        stage_layers: encoder layers of each of this rank's stages.
    """
    stages = [
        Stage(num_layers, index, parallel.recompute, data.image_size, data.channels)
        for index, num_layers in enumerate(stage_layers)
    ]
    names = ["model"] if len(stages) == 1 else [f"model{index}" for index in range(len(stages))]
    return {name: build(stage) for name, stage in zip(names, stages, strict=True)}
