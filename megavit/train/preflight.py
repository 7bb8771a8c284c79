"""Run one step, one evaluation batch, one save and one load in the real layout before training (preflight).

Errors that would occur after hours occur now. Weights and optimizer are then restored bit for bit.
"""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavit.checkpoint import shards
from megavit.checkpoint.config import CheckpointConfig
from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.shards import Averages
from megavit.checkpoint.state import TrainingState
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import ResolvedRun
from megavit.data.loader import Batch, Loader
from megavit.errors import ConfigError
from megavit.model.vit import EncoderStage
from megavit.optim.optimizer import state_bytes
from megavit.parallel.collectives import broadcast_from_rank0, raise_on_all_ranks
from megavit.parallel.host import available_bytes
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.rng import seed_step
from megavit.train.engine import Engine

_FOLDER = ".preflight"
_FP32_BYTES = 4
_NORMALISED_BYTES = 1 + 2 * _FP32_BYTES
# DataLoader's prefetch_factor.
_READ_AHEAD = 2


def run_preflight(
    config: ExperimentConfig,
    *,
    layout: ParallelLayout,
    engine: Engine,
    chunks: dict[str, EncoderStage],
    optimizer: MegatronOptimizer,
    averages: Averages | None,
    loaders: tuple[Loader, Loader | None],
    resolved: ResolvedRun,
    step: int,
) -> list[str]:
    """Run the preflight, if `run.preflight` enables it and steps remain; every rank calls this.

    Args:
        config: the run's configuration.
        layout: this rank's place.
        engine: runs the network.
        chunks: this rank's stages by name, with initial weights.
        optimizer: the optimizer of the stages, before its first step.
        averages: moving averages of the weights, if any.
        loaders: training and validation loader; None without validation images.
        resolved: step, length and pace of the run.
        step: steps already done.

    Returns:
        One line with the result; none if the preflight did not run.

    Raises:
        ConfigError: if the run's folder cannot be used.
    """
    wanted = layout.world_size > 1 if config.run.preflight is None else config.run.preflight
    steps = range(step, resolved.num_steps)
    if not wanted or not steps:
        return []
    run_dir, every = Path(config.run.dir), resolved.pace.save_every or steps.stop
    check_folder(run_dir, rank=layout.rank)
    saves = _checkpoints_at_once(config.checkpoint, every, steps)
    of_optimizer, ema = state_bytes(config.optim), averages is not None
    room = check_disk(run_dir, chunks, layout, saves=saves, optimizer_bytes=of_optimizer, ema=ema)
    preflight_run = PreflightRun(
        run_dir, layout=layout, engine=engine, chunks=chunks, optimizer=optimizer, averages=averages
    )
    took = preflight_run.run(
        *loaders,
        num_microbatches=resolved.num_microbatches,
        global_batch=config.train.global_batch,
        seed=config.run.seed,
    )
    return [f"preflight: {took}; {room}"]


def check_batch(config: ExperimentConfig, layout: ParallelLayout, resolved: ResolvedRun) -> None:
    """Check that the global batch is not larger than the training set, and that a micro batch's images fit in memory.

    Every rank calls this.

    Args:
        config: the run's configuration.
        layout: this rank's place.
        resolved: micro batch and number of training images.

    Raises:
        ConfigError: if not, with the arithmetic.
    """
    global_batch, num_samples = config.train.global_batch, resolved.num_samples
    if global_batch > num_samples:
        raise ConfigError(
            f"train.global_batch={global_batch} is more than the {num_samples} training images of data.source="
            f"{config.data.source}: a step would read some of them twice; lower it to {num_samples} or less"
        )
    raise_on_all_ranks(_describe_overflow(config, layout, resolved.micro_batch) if layout.holds_first_stage else None)


def _describe_overflow(config: ExperimentConfig, layout: ParallelLayout, micro_batch: int) -> str | None:
    """Describe why the images in memory at one time exceed it, without activations; return None if they fit.

    The training device holds a micro batch as uint8 and, while it is normalised, twice in fp32. One rank of each
    tensor-parallel group prefetches.
    """
    data = config.data
    ahead = _READ_AHEAD * data.workers if layout.tp_rank == 0 else 0
    local_ranks = min(layout.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # Other pipeline stages hold no images.
    holders = max(1, local_ranks // layout.pp)
    host = available_bytes() // holders, f"in the memory of {socket.gethostname()} for each of {holders} ranks"
    size = f"{_NORMALISED_BYTES} bytes (uint8, and fp32 twice)"
    read = f"{ahead} bytes (uint8, read ahead by {data.workers} data.workers)"
    if layout.device.type == "cuda":
        gpu = torch.cuda.mem_get_info(layout.device)[0], "on the GPU"
        needs = [(_NORMALISED_BYTES, size, *gpu), (ahead, read, *host)]
    else:
        needs = [(_NORMALISED_BYTES + ahead, f"({size} + {read})" if ahead else size, *host)]
    for bytes_each, of_what, free, where in needs:
        image = data.channels * data.image_size[0] * data.image_size[1] * bytes_each
        if micro_batch * image > free:
            height, width = data.image_size
            return (
                f"train.global_batch={config.train.global_batch} makes micro batches of {micro_batch:,} images × "
                f"{data.channels} channels × {height} × {width} × {of_what} = {_bytes(micro_batch * image)}, and "
                f"{_bytes(free)} is free {where}; set train.micro_batch to less than {free // image:,} (the network "
                f"needs memory too), or lower train.global_batch or data.workers"
            )
    return None


def check_disk(
    run_dir: Path,
    chunks: dict[str, EncoderStage],
    layout: ParallelLayout,
    *,
    saves: int,
    optimizer_bytes: int,
    ema: bool,
) -> str:
    """Check that a run's checkpoints fit on the disk; every rank calls this.

    Args:
        run_dir: the run's folder.
        chunks: this rank's stages.
        layout: this rank's place.
        saves: largest number of checkpoints that exist at the same time.
        optimizer_bytes: bytes of optimizer state per trained weight, without the weight's fp32 copy.
        ema: whether a checkpoint holds a moving average of the weights.

    Returns:
        The arithmetic, as text.

    Raises:
        ConfigError: if they do not fit, with the arithmetic.
    """
    params = [p for chunk in chunks.values() for p in chunk.parameters() if _is_counted_here(p, layout)]
    extra = {p: p.requires_grad * (optimizer_bytes + _FP32_BYTES) + ema * _FP32_BYTES for p in params}
    each = torch.tensor([sum(p.numel() * (p.element_size() + extra[p]) for p in params)])
    each = each.to(layout.device)
    dist.all_reduce(each)
    size = int(each)

    def look() -> str:
        free, needed = shutil.disk_usage(run_dir).free, size * saves
        account = f"{saves} checkpoints of about {_bytes(size)} = {_bytes(needed)}, {_bytes(free)} free"
        if needed > free:
            raise ConfigError(
                f"run.dir={run_dir} has no room for {account}; raise checkpoint.save_every, set "
                f"checkpoint.keep_last=3, free space, or choose another run.dir "
                f"(run.preflight=false skips this check)"
            )
        return account

    return broadcast_from_rank0(look)


def _checkpoints_at_once(config: CheckpointConfig, every: int, steps: range) -> int:
    """Count the checkpoints that exist at the same time: periodic ones, the last and the best."""
    due = (steps.stop - 1) // every - steps.start // every + 1
    if config.keep_last is not None:
        spared = (steps.stop // config.keep_every) if config.keep_every else 0
        # A new checkpoint is written before an old one is deleted.
        due = min(due, config.keep_last + spared + 1)
    return due + config.best


def check_folder(run_dir: Path, *, rank: int) -> None:
    """Check that every rank writes into the same folder; every rank calls this.

    Raises:
        ConfigError: on every rank if one cannot; names the first rank that fails.
    """
    token, mine = run_dir / _FOLDER / "token", run_dir / _FOLDER / f"rank_{rank}"

    def write(path: Path) -> str | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(rank))
        except OSError as error:
            return f"run.dir={run_dir} cannot be written by rank {rank} on {socket.gethostname()}: {error.strerror}"
        return None

    raise_on_all_ranks(write(token) if rank == 0 else None)
    raise_on_all_ranks(write(mine))
    raise_on_all_ranks(
        None
        if token.exists()
        else f"run.dir={run_dir}: rank {rank} on {socket.gethostname()} does not see what rank 0 has written; all "
        f"nodes need the same folder, on a shared file system"
    )
    if rank == 0:
        shutil.rmtree(run_dir / _FOLDER)


class PreflightRun:
    """Run one step, one evaluation batch, one save and one load, and restore the state.

    Args:
        run_dir: the run's folder, already checked.
        layout: this rank's place.
        engine: runs the network.
        chunks: this rank's stages by name.
        optimizer: the optimizer of the stages.
        averages: moving averages of the weights, if any.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        layout: ParallelLayout,
        engine: Engine,
        chunks: dict[str, EncoderStage],
        optimizer: MegatronOptimizer,
        averages: Averages | None,
    ) -> None:
        self.run_dir, self.layout, self.engine, self.chunks = run_dir, layout, engine, chunks
        self.optimizer, self.averages = optimizer, averages

    def run(
        self, train_loader: Loader, val_loader: Loader | None, *, num_microbatches: int, global_batch: int, seed: int
    ) -> str:
        """Run all parts; every rank calls this.

        Args:
            train_loader: loader of training images.
            val_loader: loader of validation images; None without any.
            num_microbatches: micro batches per step on this rank.
            global_batch: images per step.
            seed: `run.seed`.

        Returns:
            The seconds of each part, as text.

        Raises:
            ConfigError: if the checkpoint cannot be written.
        """
        saved = list(self._kept())
        groups = [_settings(group) for part in self._parts() for group in part.param_groups]
        seed_step(self.layout, seed=seed, step=0)
        batches = train_loader.train_batches(0, num_steps=1, global_batch=global_batch)
        took = {"a step": self._timed(lambda: self._step(batches, num_microbatches))}
        if val_loader is not None:
            took["an evaluation batch"] = self._timed(partial(self.engine.evaluate_fewest, val_loader))
        checkpoints = CheckpointManager(self.run_dir / _FOLDER)
        nothing = TrainingState(0, 0, {})
        took["a save"] = self._timed(
            lambda: checkpoints.save(self.chunks, self.optimizer, nothing, run_yaml="", averages=self.averages)
        )
        (written,) = checkpoints.all()
        took["a load"] = self._timed(
            lambda: shards.load(written, self.chunks, self.optimizer, averages=self.averages),
        )
        dist.barrier()
        if self.layout.rank == 0:
            shutil.rmtree(checkpoints.folder)
        self._put_back(saved, groups)
        return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items())

    def _timed(self, work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _step(self, batches: Iterator[Batch], num_microbatches: int) -> None:
        # The first training step checks whether its gradients are finite.
        self.engine.train_step(batches, num_microbatches, self.optimizer)
        self.engine.gather_weights()

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [part.optimizer for part in self.optimizer.chained_optimizers if part.optimizer is not None]

    def _tensors(self) -> Iterator[Tensor]:
        for chunk in self.chunks.values():
            yield from chunk.parameters()
            # Feature statistics of a linear probe.
            yield from chunk.buffers()
        for part in self._parts():
            for group in part.param_groups:
                yield from group["params"]

    def _kept(self) -> Iterator[Tensor]:
        """Yield copies of weights, buffers and master weights in host memory."""
        for tensor in self._tensors():
            yield tensor.detach().cpu().clone()

    def _put_back(self, saved: list[Tensor], groups: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            for tensor, before in zip(self._tensors(), saved, strict=True):
                tensor.copy_(before)
        every = [group for part in self._parts() for group in part.param_groups]
        for group, settings in zip(every, groups, strict=True):
            for key in set(group) - set(settings) - {"params"}:
                del group[key]
            group.update(settings)
        for part in self._parts():
            part.state.clear()
        self.optimizer.zero_grad()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _is_counted_here(parameter: torch.nn.Parameter, layout: ParallelLayout) -> bool:
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return layout.dp_rank == 0 and (sharded or layout.tp_rank == 0)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} TB" if count >= 1000 else f"{count:.3g} TB"
