"""Save checkpoints during training, in the background if configured; mark the best, delete old ones."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.save import PendingSave
from megavit.checkpoint.shard_writer import in_background
from megavit.checkpoint.shards import Averages
from megavit.checkpoint.state import TrainingState
from megavit.config.experiment import ExperimentConfig
from megavit.config.saved import to_yaml
from megavit.metrics.logger import MetricLogger
from megavit.model.vit import EncoderStage


class Checkpointer:
    """Save and prune the checkpoints of a run; every rank calls its methods together.

    Args:
        store: checkpoints of the run.
        config: the run's configuration.
        chunks: this rank's stages by name.
        optimizer: the optimizer of the stages.
        averages: returns the weights' averages at the time of the call, if any.
        on_saved: called on rank 0, in the background, after a checkpoint is complete and old ones are deleted.
    """

    def __init__(
        self,
        store: CheckpointManager,
        config: ExperimentConfig,
        *,
        chunks: dict[str, EncoderStage],
        optimizer: MegatronOptimizer,
        averages: Callable[[], Averages | None],
        on_saved: Callable[[], None],
    ) -> None:
        self._store, self._config, self._on_saved = store, config, on_saved
        self._chunks, self._optimizer, self._averages = chunks, optimizer, averages
        self._save: PendingSave | None = None
        self._is_best = False
        self._stall_s = 0.0
        self._tidying: Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        """Return whether this rank is still writing its part of a checkpoint."""
        return self._save is not None and not self._save.is_written

    def save(self, state: TrainingState, logger: MetricLogger, *, is_best: bool, waits: bool) -> None:
        """Save the current state.

        Args:
            state: step, samples and metrics.
            logger: the run's logger.
            is_best: whether this checkpoint is better than all earlier ones.
            waits: complete the save before returning; otherwise `finish` must be called later.
        """
        self.finish(logger)
        begun = time.perf_counter()
        self._save = self._store.begin(
            self._chunks,
            self._optimizer,
            state,
            run_yaml=to_yaml(self._config),
            averages=self._averages(),
            copy_to_host=not waits,
        )
        self._is_best, self._stall_s = is_best, time.perf_counter() - begun
        if waits:
            self.finish(logger)

    def finish(self, logger: MetricLogger) -> None:
        """Complete the pending save, if any."""
        save, self._save = self._save, None
        if save is None:
            return
        begun = time.perf_counter()
        path = save.finish()
        if dist.get_rank() == 0:
            self._wait_for_tidying()
            self._tidying = in_background(partial(self._tidy, path, is_best=self._is_best))
        waited_s = self._stall_s + time.perf_counter() - begun
        logger.log(save.state.step, "save", {"waited_s": waited_s, "bytes": save.num_bytes})
        if self._is_best:
            logger.info(f"step {save.state.step}  the best so far")

    def close(self, logger: MetricLogger) -> None:
        """Complete the pending save and the deletion of old checkpoints; every rank calls this after the last save."""
        self.finish(logger)
        self._wait_for_tidying()

    def _wait_for_tidying(self) -> None:
        if self._tidying is not None:
            self._tidying.result()
        self._tidying = None

    def _tidy(self, path: Path, *, is_best: bool) -> None:
        """Mark the best and delete old ones, in the background because deleting gigabytes takes a second."""
        if is_best:
            self._store.name_best(path)
        retention = self._config.checkpoint
        self._store.prune(keep_last=retention.keep_last, keep_every=retention.keep_every)
        self._on_saved()
