"""Run megavit's candidates: the training step built from the trainer's parts, and the trainer itself."""

import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.device_rates import synchronize
from benchmarks.step.workload import Work
from megavit.checkpoint.param_mapping import Dims, to_timm
from megavit.checkpoint.shards import gather_full_state_dict
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_step
from megavit.optim.optimizer import build_optimizer, build_schedule
from megavit.parallel.layout import ParallelLayout
from megavit.train.callbacks import StepReport
from megavit.train.engine import Engine, wrap_network
from megavit.train.setup import build_model


class Megavit:
    """megavit's training step, the same as the trainer's.

    Args:
        work: batch, number format and device.
        config: the row's settings with this candidate's.
        layout: this rank's place.
    """

    def __init__(self, work: Work, config: ExperimentConfig, layout: ParallelLayout) -> None:
        self._work, self._layout, self._config = work, layout, config
        resolved = resolve_step(config, layout.world_size, num_classes=config.data.num_classes or 0)
        self._network = network = build_model(config, layout, resolved)
        self._task = network.task
        self._model = wrap_network(network, config)
        self._engine = Engine(network, self._model, layout=layout)
        self._task.prepare(iter([work.batch]))
        self._optimizer = build_optimizer(
            self._model, network.mcore_config, config.optim, depths=network.depths(), peak_lr=resolved.peak_lr
        )
        # The schedule sets the weight decay of each group.
        schedule = build_schedule(
            self._optimizer, config.optim, peak_lr=resolved.peak_lr, warmup_steps=0, num_steps=1_000_000
        )
        schedule.step(1)
        self._batches = repeat(work.batch)

    def step(self, *, shared_masks: bool = False) -> None:
        _, _, updated = self._engine.train_step(self._batches, 1, self._optimizer)
        assert updated

    def outputs(self) -> tuple[Tensor, float]:
        with torch.no_grad():
            output, loss = self._task.forward(self._work.batch, self._model[0])
            return output.float().cpu(), float(loss(output)[0])

    def forward(self) -> Tensor:
        output, loss = self._task.forward(self._work.batch, self._model[0])
        return loss(output)[0]

    def held(self) -> list[Tensor]:
        tensors: list[Tensor] = []
        for chunk in self._model:
            tensors += [*chunk.parameters(), *(buffer.grad_data for buffer in chunk.buffers)]
        for part in self._optimizer.chained_optimizers:
            inner = part.optimizer
            tensors += [param for group in inner.param_groups for param in group["params"]]
            tensors += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
        return tensors

    def timm_weights(self) -> dict[str, Tensor] | None:
        """Return the full network's weights in timm's names, fp32, on rank 0; None on other ranks."""
        names = {name: parameter for parameter, name in self._network.parameters.items()}
        full = gather_full_state_dict(names, self._layout)
        if full is None:
            return None
        model, task = self._config.model, self._config.task
        decoder = task.decoder(model)
        dims = Dims(model.num_heads, model.patch_size, decoder.num_heads if decoder is not None else 0)
        return {name: weight.float() for name, weight in to_timm(full, dims).items()}


def time_loop(
    config: ExperimentConfig, bare: Megavit, *, rounds: int, steps: int, until: float
) -> dict[str, list[float]]:
    """Time the full trainer, data and log included, and the bare step in alternate turns.

    Args:
        config: the row's settings.
        bare: the bare step of the same network.
        rounds: turns of each.
        steps: steps per turn.
        until: `time.monotonic()` after which no new turn begins.

    Returns:
        Seconds of each turn, by candidate.
    """
    from megavit.train.trainer import Trainer

    seconds: dict[str, list[float]] = {"megavit": [], "trainer": []}
    started = 0.0

    def alternate(report: StepReport) -> None:
        """Time `steps` bare steps after every `steps` steps of the trainer."""
        nonlocal started
        if report.step % steps:
            return
        synchronize(trainer.layout.device)
        # The first turn warms up.
        if report.step > steps:
            seconds["trainer"].append(time.perf_counter() - started)
        seconds["megavit"].append(timed(bare.step, steps, trainer.layout.device))
        if len(seconds["trainer"]) >= rounds or time.monotonic() > until:
            raise _Enough
        started = time.perf_counter()

    trainer = Trainer(config, on_step_end=[alternate])
    try:
        trainer.run()
    except _Enough:
        # Pair each turn of the trainer with the bare turn right after it.
        seconds["megavit"] = seconds["megavit"][-len(seconds["trainer"]) :] if seconds["trainer"] else []
    return seconds


class _Enough(Exception):
    """All turns of the trainer have been timed."""


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Return the seconds of a number of steps, until the device has finished them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - start
