"""Train: build the parts of a run in the order of the data flow, then run the only training loop."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megavit.checkpoint import shards
from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.shards import Averages
from megavit.checkpoint.state import TrainingState
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_num_images, resolve_run
from megavit.config.saved import to_yaml
from megavit.config.settings import flatten
from megavit.config.train import OnNonfinite
from megavit.data.bad_samples import BadSampleTracker
from megavit.data.loader import Loader
from megavit.data.sources.open import open_splits, prepare_index
from megavit.data.sources.relabel import relabel
from megavit.errors import ConfigError
from megavit.metrics.logger import MetricLogger
from megavit.metrics.plots import draw_curves
from megavit.metrics.provenance import record_launch
from megavit.metrics.throughput import Throughput, peak_memory_bytes
from megavit.optim.config import Schedule
from megavit.optim.ema import ModelEma
from megavit.optim.optimizer import build_optimizer, build_schedule
from megavit.parallel.collectives import broadcast_from_rank0, wait_for_rank_zero
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.rng import seed_step
from megavit.planner.flops import training_flops
from megavit.runtime.run_dir import FINISHED, STOPPED
from megavit.runtime.signals import StopConsensus, StopRequest
from megavit.train.callbacks import StepCallback, StepReport, open_callback
from megavit.train.checkpointer import Checkpointer
from megavit.train.engine import Engine, prepare_task, wrap_network
from megavit.train.freeze import freeze
from megavit.train.init_from import load_pretrained
from megavit.train.nonfinite import describe_nonfinite
from megavit.train.preflight import check_batch, run_preflight
from megavit.train.resume import ResumePoint, find_resume_point
from megavit.train.setup import build_model
from megavit.train.summary import describe_pace, describe_run


class Trainer:
    """Train one rank of a run.

    Args:
        config: the run's configuration, checked for this world size.
        stop: records a signal that requests this process to stop.
        on_step_end: callbacks, called in order at the end of each step, after its evaluation and save;
            then those of `train.callbacks`.
        evaluates: whether the validation set is evaluated.
        saves: whether checkpoints are written.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        stop: StopRequest | None = None,
        on_step_end: Sequence[StepCallback] = (),
        evaluates: bool = True,
        saves: bool = True,
    ) -> None:
        self.config, self.stop = config, stop or StopRequest()
        self.on_step_end = [*on_step_end, *map(open_callback, config.train.callbacks or ())]
        self.evaluates, self.saves = evaluates, saves
        self.run_dir = Path(config.run.dir)
        self.store = CheckpointManager(self.run_dir / "checkpoints")
        self.layout = layout = ParallelLayout.create(config.parallel, timeout_s=config.run.timeout_s)

        # Resume point
        self.step, self.consumed_samples = 0, 0
        self.last_validation: dict[str, float] = {}
        broadcast_from_rank0(self.store.remove_partial)
        self.best_validation = broadcast_from_rank0(self.store.best_metrics)
        self.resume_point, self.warnings = broadcast_from_rank0(lambda: find_resume_point(self.store, config))
        if self.resume_point is not None:
            self.step, self.consumed_samples = self.resume_point.state.step, self.resume_point.state.consumed_samples

        # Length
        index = self.run_dir / "index"
        wait_for_rank_zero(lambda: prepare_index(config.data, index))
        train_source, val_source = open_splits(config.data, index=index)
        if config.task.has_classes and val_source is not None:
            val_source = relabel(val_source, train_source.classes, data="the validation split", trained="training")
        if self.resume_point is not None:
            self.resume_point.refuse_other_classes(train_source.classes)
        self.resolved = resolved = resolve_run(
            config,
            layout.world_size,
            num_classes=len(train_source.classes),
            num_samples=len(train_source),
            step=self.step,
            consumed_samples=self.consumed_samples,
        )
        check_batch(config, layout, resolved)

        # Network
        self.network = network = build_model(config, layout, resolved)
        self.task, self.chunks = network.task, network.chunks
        if config.frozen:
            freeze(self.chunks, config.frozen, new_parameters=config.task.new_parameters, layout=layout)
        self.model = wrap_network(network, config)
        self.engine = Engine(network, self.model, layout=layout)

        # Data
        loader = partial(
            Loader,
            config=config.data,
            layout=layout,
            fields=self.task.fields,
            micro_batch=resolved.micro_batch,
            seed=config.run.seed,
        )
        self.train_loader = loader(train_source, train=True)
        self.val_loader = loader(val_source, train=False) if val_source is not None else None
        self.loaders = {"train": self.train_loader}
        if self.val_loader is not None:
            self.loaders["val"] = self.val_loader
        self.bad_samples = {
            split: BadSampleTracker(of, split, run_dir=self.run_dir) for split, of in self.loaders.items()
        }
        # Without validation images a task visualises training images.
        self.painted = "val" if self.val_loader is not None else "train"
        self.paint_loader = self.val_loader or loader(train_source, train=False)
        if self.task.baseline_samples:
            prepare_task(self.task, loader, train_source, seed=config.run.seed)

        # Optimizer and schedule
        self.optimizer = build_optimizer(
            self.model, network.mcore_config, config.optim, depths=network.depths(), peak_lr=resolved.peak_lr
        )
        self.schedule = build_schedule(
            self.optimizer,
            config.optim,
            peak_lr=resolved.peak_lr,
            warmup_steps=resolved.pace.warmup_steps,
            num_steps=resolved.num_steps,
        )

        self.average = ModelEma(self.chunks, decay=config.optim.ema) if config.optim.ema is not None else None

        # Checkpoints
        self.checkpointer = Checkpointer(
            self.store,
            config,
            chunks=self.chunks,
            optimizer=self.optimizer,
            averages=lambda: self._averages,
            on_saved=self._draw_curves,
        )
        if self.resume_point is None and config.init_from is not None:
            self._start_from(config.init_from)
        self.preflight_ran = run_preflight(
            config,
            layout=layout,
            engine=self.engine,
            chunks=self.chunks,
            optimizer=self.optimizer,
            averages=self._averages,
            loaders=(self.train_loader, self.val_loader),
            resolved=resolved,
            step=self.step,
        )
        self._restore()
        self.throughput = Throughput(
            flops_per_image=training_flops(resolved.shape), num_devices=layout.world_size, device=layout.device
        )

    def run(self) -> int:
        """Train to the last step.

        Returns:
            The exit code: FINISHED, or STOPPED after `train.stop_at` or a signal.
        """
        config, layout = self.config, self.layout
        if layout.rank == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(to_yaml(config))
            record_launch(self.run_dir, layout=layout.describe(), step=self.step, monitor=asdict(self.task.monitor))
        logger = MetricLogger(
            config.metrics,
            self.run_dir,
            is_main=layout.rank == 0,
            name=config.run.name,
            settings=flatten(config),
            task_metrics=self.task.reported,
            first_step=self.step,
            num_steps=self.resolved.num_steps,
        )
        with logger:
            self._introduce(logger)
            if self.step >= self.resolved.num_steps:
                self._say_complete(logger)
                return FINISHED
            batches = self.throughput.timed(
                self.train_loader.train_batches(
                    self.consumed_samples,
                    num_steps=self.resolved.num_steps - self.step,
                    global_batch=config.train.global_batch,
                )
            )
            self._train(logger, batches)
            if self.step < self.resolved.num_steps:
                logger.info(
                    f"stopped after step {self.step} of {self.resolved.num_steps}, saved; run again to continue"
                )
                return STOPPED
            self._say_complete(logger)
            return FINISHED

    def _train(self, logger: MetricLogger, batches: Any) -> None:
        train = self.config.train
        last = min(self.resolved.num_steps, train.stop_at or self.resolved.num_steps)
        consensus = StopConsensus(self.stop, world_size=self.layout.world_size)
        window: dict[str, Tensor] = {}
        while self.step < last:
            seed_step(self.layout, seed=self.config.run.seed, step=self.step)
            self.schedule.step(1)
            sums, grad_norm, updated = self.engine.train_step(batches, self.resolved.num_microbatches, self.optimizer)
            skipped = None if updated else self._refuse_step(logger, grad_norm, sums)
            if updated and self.average is not None:
                self.average.update()
            self.step += 1
            self.consumed_samples += train.global_batch
            self.throughput.count(train.global_batch)
            logger.advance(self.step)
            wants_stop, all_written = consensus.result()
            if all_written:
                self.checkpointer.finish(logger)
            if wants_stop:
                logger.info(f"stop requested by {self.stop.asked_by or 'a signal to another rank'}: saving")
                last = self.step
            window = {name: window[name] + value if window else value for name, value in sums.items()}
            if self.step % self.config.metrics.log_every == 0 or self.step == last:
                self._report(logger, window, grad_norm)
                window = {}
            self._evaluate_paint_save(logger, is_last=self.step == last)
            for callback in self.on_step_end:
                callback(StepReport(self.step, sums, grad_norm, skipped))
            consensus.start(is_writing=self.checkpointer.is_writing)
        consensus.result()
        self.checkpointer.close(logger)

    def _refuse_step(self, logger: MetricLogger, grad_norm: float, sums: dict[str, Tensor]) -> str:
        """Raise for a step with non-finite gradients, or skip it and return the reason; every rank calls this."""
        account = describe_nonfinite(list(self.chunks.values()), sums, self.layout)
        message = f"step {self.step + 1}: the gradient norm is {grad_norm:g}; {account}"
        if self.config.train.on_nonfinite is OnNonfinite.stop:
            self.checkpointer.close(logger)
            raise FloatingPointError(
                f"{message}. The weights were not updated and the last checkpoint is unchanged. Lower optim.lr, raise "
                f"optim.warmup_steps or lower optim.clip_grad; train.on_nonfinite=skip continues without such steps"
            )
        logger.info(f"{message}; the step is skipped")
        return message

    def _report(self, logger: MetricLogger, window: dict[str, Tensor], grad_norm: float) -> None:
        """Log the mean metrics of the steps since the last report, and the last step's learning rate and norm."""
        totals = self.engine.totals(window)
        speed = self.throughput.report()
        logger.log(
            self.step,
            "train",
            {
                "consumed_samples": self.consumed_samples,
                **self.task.metrics(totals),
                **self._count_bad(logger, "train"),
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "grad_norm": grad_norm,
                **speed,
                "peak_memory_bytes": peak_memory_bytes(self.layout.device),
            },
        )

    def _count_bad(self, logger: MetricLogger, split: str) -> dict[str, float]:
        """Log the images that could not be read since the last call; raise on every rank if there are too many."""
        bad = self.bad_samples[split]
        for line in bad.collect(self.step):
            logger.info(line)
        if bad.too_many is not None:
            self.checkpointer.close(logger)
            raise ConfigError(bad.too_many)
        return bad.metrics

    def _evaluate_paint_save(self, logger: MetricLogger, *, is_last: bool) -> None:
        finished = self.step == self.resolved.num_steps
        every, eval_every = self.resolved.pace.save_every, self.resolved.pace.eval_every
        evaluates = self.evaluates and self.val_loader is not None
        evaluates = evaluates and (finished or (eval_every is not None and self.step % eval_every == 0))
        due = is_last or (every is not None and self.step % every == 0)
        pictures_every = self.config.metrics.pictures_every
        paints = pictures_every is not None and (finished or self.step % pictures_every == 0)
        if not (evaluates or due or paints):
            return
        self.throughput.pause()
        self.engine.gather_weights()
        if evaluates:
            self.last_validation = self.evaluate()
            counted = self._count_bad(logger, "val")
            logger.log(self.step, "val", {"consumed_samples": self.consumed_samples, **self.last_validation, **counted})
        is_best = evaluates and self._is_best()
        if paints:
            image_grid = self.engine.visualize(self.paint_loader)
            logger.log_images(self.step, self.painted, image_grid, titles=self.task.image_grid)
        if self.saves and (due or is_best):
            self._save(logger, due=due, is_best=is_best, is_last=is_last)
        self.throughput.resume()

    def _save(self, logger: MetricLogger, *, due: bool, is_best: bool, is_last: bool) -> None:
        state = TrainingState(
            self.step,
            self.consumed_samples,
            self.last_validation,
            list(self.train_loader.source.classes),
            due=due,
            num_samples=len(self.train_loader.source),
        )
        self.checkpointer.save(state, logger, is_best=is_best, waits=is_last or not self.config.checkpoint.async_save)
        if is_best:
            self.best_validation = self.last_validation

    def _draw_curves(self) -> None:
        pictures = self.run_dir / "pictures"
        draw_curves(self.run_dir / "metrics.jsonl", pictures / "curves.png", task_metrics=self.task.reported)

    def _is_best(self) -> bool:
        wanted = self.config.checkpoint.best
        return wanted and self.task.monitor.is_better(self.last_validation, than=self.best_validation)

    @property
    def _averages(self) -> Averages | None:
        return None if self.average is None else self.average.weights

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics over the full validation set; `ema_…` are those of the moving average."""
        assert self.val_loader is not None
        values = self.engine.validate(self.val_loader)
        if self.average is not None:
            with self.average.applied():
                averaged = self.engine.validate(self.val_loader)
            values |= {f"ema_{name}": value for name, value in averaged.items() if name != "count"}
        return values

    def _restore(self) -> None:
        """Load weights, optimizer and schedule from the checkpoint, if the run resumes.

        Dropout and data have no state: they are functions of step and position.
        """
        resume_point = self.resume_point
        if resume_point is None:
            return
        shards.load(resume_point.path, self.chunks, self.optimizer, averages=self._averages)
        self.last_validation = resume_point.state.metrics
        self.warnings += resume_point.settings_warnings(self.config)
        self.warnings += resume_point.data_warnings(len(self.train_loader.source))
        self.schedule.step(self.step)

    def _start_from(self, place: str) -> None:
        """Load pretrained weights, and copy them to the optimizer's master weights and the moving average."""
        classes = self.train_loader.source.classes
        self.warnings += load_pretrained(place, self.chunks, self.config, self.layout, classes=tuple(classes))
        self.optimizer.reload_model_params()
        if self.average is not None:
            self.average = ModelEma(self.chunks, decay=self.average.decay)

    def _introduce(self, logger: MetricLogger) -> None:
        from_scratch = self.resume_point is None and self.config.init_from is None
        sources = {split: loader.source for split, loader in self.loaders.items()}
        for line in (
            *describe_run(self.config, self.layout, self.network, sources=sources, from_scratch=from_scratch),
            *describe_pace(self.config, self.resolved),
        ):
            logger.info(line)
        for line in (*self.preflight_ran, *self.warnings):
            logger.info(line)
        if self.resume_point is not None:
            logger.info(f"resumes from {self.resume_point.path} at step {self.step} of {self.resolved.num_steps}")
            self._log_changed_length(logger, self.resume_point)

    def _log_changed_length(self, logger: MetricLogger, resume_point: ResumePoint) -> None:
        num_samples, decay = self.resolved.num_samples, self.config.optim.schedule
        before = resume_point.num_steps(num_samples)
        if before == self.resolved.num_steps:
            return
        images, rate = "", ""
        if self.config.train.epochs is not None:
            total = resolve_num_images(self.config, num_samples)
            images = (
                f", train.epochs={self.config.train.epochs:g} of {num_samples:,} images = {total:,}, of which "
                f"{max(0, total - self.consumed_samples):,} are left for steps of {self.config.train.global_batch:,}"
            )
        if decay is not Schedule.constant:
            current = max(self.schedule.get_lr(group) for group in self.optimizer.param_groups)
            rate = f": the {decay.value} schedule spans the new length, so the learning rate continues at {current:.2e}"
        logger.info(f"the run had {before} steps and has {self.resolved.num_steps} now{images}{rate}")

    def _say_complete(self, logger: MetricLogger) -> None:
        length = "train.steps" if self.config.train.steps is not None else "train.epochs"
        result = f"; {self.task.summary(self.last_validation)}" if self.last_validation else ""
        logger.info(f"complete: step {self.step} of {self.resolved.num_steps}{result}. Raise {length} to continue")
