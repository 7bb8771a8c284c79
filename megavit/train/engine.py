"""Run micro batches through this rank's stages, to train, evaluate or visualise predictions."""

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
from megavit.optim.registry import is_sharded
from megavit.optim.step import step_if_finite
from megavit.parallel.collectives import broadcast_from
from megavit.parallel.ddp import wrap_for_data_parallel
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.pipeline import ForwardStep, add_microbatches, run_microbatches, sum_over_world
from megavit.task.base import Task
from megavit.train.setup import ModelSetup

_IMAGES_PAINTED = 8


class Engine:
    """Run the network; every rank calls its methods together.

    Args:
        network: this rank's stages.
        model: the stages in order: wrapped for data parallelism to train, or unwrapped.
        layout: this rank's place.
    """

    def __init__(self, network: ModelSetup, model: list[torch.nn.Module], *, layout: ParallelLayout) -> None:
        self.task, self.model, self.layout = network.task, model, layout
        self.micro_batch = network.resolved.micro_batch
        self.boundary = network.task.boundary(self.micro_batch, network.mcore_config)

    def train_step(
        self, batches: Iterator[Batch], num_microbatches: int, optimizer: MegatronOptimizer
    ) -> tuple[dict[str, Tensor], float, bool]:
        """Run one training step: compute the gradients, and update the weights if every gradient is finite.

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
        """Run one step's micro batches and reduce their gradients over the data-parallel ranks.

        Returns:
            The sums of this rank's micro batches; empty except on the last stage.
        """
        return add_microbatches(self._run(self.task.forward, batches, num_microbatches, forward_only=False))

    def validate(self, loader: Loader) -> dict[str, float]:
        """Return the task's metrics over all images of the loader, each counted once; `count` is their number."""
        outputs = self._evaluating(self.task.forward, loader, loader.num_evaluation_batches)
        totals = self.totals(add_microbatches(outputs))
        return {**self.task.metrics(totals), "count": totals["count"]}

    def totals(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sum metric sums over all ranks, with each image counted once."""
        totals = sum_over_world(sums, dict.fromkeys(self.task.metric_sums, ()), self.layout)
        return {name: float(total) for name, total in totals.items()}

    def evaluate_sums(self, loader: Loader) -> dict[str, Tensor]:
        """Return all the sums of the task over all images of the loader, each counted once."""
        outputs = self._evaluating(self.task.evaluate_sums, loader, loader.num_evaluation_batches)
        return sum_over_world(add_microbatches(outputs), self.task.metric_shapes, self.layout)

    def visualize(self, loader: Loader) -> Tensor:
        """Return the task's image grid for the first images, uint8 [image, panel, channel, row, column]."""
        outputs = self._evaluating(self.task.visualize, loader, self._fewest_microbatches)
        count = min(_IMAGES_PAINTED, self.micro_batch, len(loader.source))
        data = loader.config
        shape = (count, len(self.task.image_grid), data.channels, *data.image_size)
        image_grid = outputs[0]["image_grid"][:count] if outputs else torch.empty(shape, dtype=torch.uint8)
        return broadcast_from(self.layout.last_stage_rank, image_grid)

    def evaluate_fewest(self, loader: Loader) -> None:
        """Evaluate the smallest possible number of micro batches."""
        self._evaluating(self.task.forward, loader, self._fewest_microbatches)

    def gather_weights(self) -> None:
        """Wait for the all-gather of the last step's weights, which otherwise overlaps the next step."""
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
    """Wrap a network's stages with gradient buffers and data parallelism, for training."""
    return wrap_for_data_parallel(
        list(network.chunks.values()),
        network.mcore_config,
        config.parallel,
        use_distributed_optimizer=is_sharded(config.optim.name),
        bf16_reduce=config.train.grad_reduce is GradReduce.bf16,
        fused_accumulation=config.train.gradient_accumulation_fusion,
    )


def prepare_task(task: Task, loader: Callable[..., Loader], source: Source, *, seed: int) -> None:
    """Pass a task the training images on which it measures its baseline; every rank calls this.

    Args:
        task: a task with `baseline_samples`.
        loader: builds a loader from a source.
        source: the training images.
        seed: `run.seed`; the images are the first in its random order, which is the same in every layout.
    """
    baseline_indices = DeterministicSampler(len(source), seed=seed).first(task.baseline_samples)
    task.prepare(loader(source, train=False, indices=baseline_indices).evaluation_batches())
