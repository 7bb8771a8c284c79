"""Micro batches through this rank's part of the network: with gradients, over the validation set, for a picture."""

from collections.abc import Callable, Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavit.config.experiment import ExperimentConfig
from megavit.config.train import GradReduce
from megavit.data.loader import Batch, Loader
from megavit.data.sampler import DeterministicSampler
from megavit.data.sources.base import Source
from megavit.optim.config import Optimizer
from megavit.optim.step import step_if_finite
from megavit.parallel.collectives import broadcast_from
from megavit.parallel.ddp import wrap_for_data_parallel
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.pipeline import ForwardStep, add_microbatches, run_microbatches, sum_over_world
from megavit.task.base import Task
from megavit.train.setup import ModelSetup

_IMAGES_PAINTED = 8


class Engine:
    """What runs the network; every rank calls its methods together.

    Args:
        network: this rank's part.
        model: its chunks in order, as they run: wrapped for training, or as they are.
        layout: this rank's place.
        micro_batch: images per micro batch.
    """

    def __init__(
        self, network: ModelSetup, model: list[torch.nn.Module], *, layout: ParallelLayout, micro_batch: int
    ) -> None:
        self.task, self.model, self.layout, self.micro_batch = network.task, model, layout, micro_batch
        self.boundary = network.task.boundary(micro_batch, network.mcore_config)

    def train_step(
        self, batches: Iterator[Batch], num_microbatches: int, optimizer: MegatronOptimizer
    ) -> tuple[dict[str, Tensor], float, bool]:
        """One step of training: gradients from nothing, then the weights, if every gradient is a finite number.

        Returns:
            The sums of this rank's micro batches, the gradient norm before clipping, and whether the weights were
            updated.
        """
        for chunk in self.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        optimizer.zero_grad()
        sums = self.accumulate(batches, num_microbatches)
        return sums, *step_if_finite(optimizer, self.model)  # type: ignore[arg-type]

    def accumulate(self, batches: Iterator[Batch], num_microbatches: int) -> dict[str, Tensor]:
        """Run one step's micro batches and leave their gradients reduced.

        Returns:
            The sums of this rank's micro batches; empty except on the last stage.
        """
        return add_microbatches(self._run(self.task.forward, batches, num_microbatches, forward_only=False))

    def validate(self, loader: Loader) -> dict[str, float]:
        """The task's metrics over the loader's whole source, each image once, in any layout; `count` says how many."""
        outputs = self._evaluating(self.task.forward, loader, loader.num_evaluation_batches)
        totals = self.totals(add_microbatches(outputs))
        return {**self.task.metrics(totals), "count": totals["count"]}

    def totals(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over all ranks, each image counted once."""
        totals = sum_over_world(sums, dict.fromkeys(self.task.metric_sums, ()), self.layout)
        return {name: float(total) for name, total in totals.items()}

    def evaluate_sums(self, loader: Loader) -> dict[str, Tensor]:
        """All that the task can count over the loader's whole source, each image once, in any layout."""
        outputs = self._evaluating(self.task.evaluate_sums, loader, loader.num_evaluation_batches)
        return sum_over_world(add_microbatches(outputs), self.task.metric_shapes, self.layout)

    def visualize(self, loader: Loader) -> Tensor:
        """The task's panels of the first images, uint8 [image, panel, channel, row, column]."""
        outputs = self._evaluating(self.task.visualize, loader, self._fewest_microbatches)
        count = min(_IMAGES_PAINTED, self.micro_batch, len(loader.source))
        data = loader.config
        shape = (count, len(self.task.image_grid), data.channels, *data.image_size)
        image_grid = outputs[0]["image_grid"][:count] if outputs else torch.empty(shape, dtype=torch.uint8)
        return broadcast_from(self.layout.last_stage_rank, image_grid)

    def check_evaluation(self, loader: Loader) -> None:
        """Evaluate as few images as can be."""
        self._evaluating(self.task.forward, loader, self._fewest_microbatches)

    def gather_weights(self) -> None:
        """See the last step's weights on every rank; where their gather overlaps the next step, nothing else waits."""
        for chunk in self.model:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    @property
    def _fewest_microbatches(self) -> int:
        # An interleaved pipeline takes micro batches in multiples of its ranks.
        return self.layout.pp if self.layout.vpp > 1 else 1

    def _evaluating(self, forward_step: ForwardStep, loader: Loader, count: int) -> list[dict[str, Tensor]]:
        for chunk in self.model:
            chunk.eval()
        with torch.no_grad():
            outputs = self._run(forward_step, loader.evaluation_batches(), count, forward_only=True)
        for chunk in self.model:
            chunk.train()
        return outputs

    def _run(
        self, forward_step: ForwardStep, batches: Iterator[Batch], count: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        return run_microbatches(
            forward_step,
            self.model,
            batches,
            num_microbatches=count,
            boundary=self.boundary,
            layout=self.layout,
            forward_only=forward_only,
        )


def wrap_network(network: ModelSetup, config: ExperimentConfig) -> list[DistributedDataParallel]:
    """A network's stages with gradient buffers, to be trained."""
    return wrap_for_data_parallel(
        list(network.chunks.values()),
        network.mcore_config,
        config.parallel,
        use_distributed_optimizer=config.optim.name is Optimizer.adamw,
        bf16_reduce=config.train.grad_reduce is GradReduce.bf16,
        fused_accumulation=config.train.gradient_accumulation_fusion,
    )


def prepare_task(task: Task, loader: Callable[..., Loader], source: Source, *, seed: int) -> None:
    """Show a task the training images that it measures its baseline on; every rank calls this.

    Args:
        task: one with `baseline_samples`.
        loader: builds a loader of a source.
        source: the training images.
        seed: `run.seed`; the images are the first of its order, a random choice that is the same in every layout.
    """
    baseline_indices = DeterministicSampler(len(source), seed=seed).first(task.baseline_samples)
    task.prepare(loader(source, train=False, indices=baseline_indices).evaluation_batches())
