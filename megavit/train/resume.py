"""Find the checkpoint to resume from, and check that it is of the same model and run."""

from dataclasses import dataclass
from pathlib import Path

from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.state import TrainingState, read_state
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_num_steps
from megavit.config.saved import from_yaml
from megavit.data.class_names import describe_change
from megavit.errors import ConfigError
from megavit.train.resume_rules import Rule, changes
from megavit.validation import format_value


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from.

    Attributes:
        path: folder of the checkpoint.
        config: configuration at the save.
        state: step, samples and metrics at the save.
    """

    path: Path
    config: ExperimentConfig
    state: TrainingState

    def refuse_other_classes(self, classes: tuple[str, ...]) -> None:
        """Check that the data of a classifier have the classes that the checkpoint was trained on.

        Args:
            classes: names of the data's classes, in label order.

        Raises:
            ConfigError: if not; names the classes that were added, removed or moved.
        """
        if not self.config.task.has_classes:
            return
        change = describe_change(self.state.classes, classes)
        if change:
            raise ConfigError(
                f"{self.path} was trained on {len(self.state.classes)} classes, and the data has other ones: {change}. "
                f"Restore the data to continue, or start a run on these classes from its weights: run.name=NEW "
                f"init_from={self.path}"
            )

    def num_steps(self, num_samples: int) -> int:
        """Return the length in steps that the run had when it was saved.

        Args:
            num_samples: training images now, for checkpoints that do not store the number.
        """
        state = self.state
        return resolve_num_steps(
            self.config, state.num_samples or num_samples, step=state.step, consumed_samples=state.consumed_samples
        )

    def settings_warnings(self, config: ExperimentConfig) -> list[str]:
        """Return at most one line that lists changed settings."""
        differ = [
            f"{setting} was {before} and is {now}"
            for setting, (before, now) in changes(self.config, config, Rule.reported).items()
        ]
        peaks = [of.optim.peak_lr(of.train.global_batch) for of in (self.config, config)]
        if config.optim.base_lr is not None and peaks[0] != peaks[1]:
            differ.append(f"the peak learning rate was {peaks[0]:g} and is {peaks[1]:g}")
        return [f"changed since step {self.state.step}: {'; '.join(differ)}"] if differ else []

    def data_warnings(self, num_samples: int) -> list[str]:
        """Return warnings for a changed number or order of training images."""
        before = self.state.num_samples
        if before in (0, num_samples):
            return []
        return [
            f"the run had {before:,} training images and has {num_samples:,} now: their order changes, and this epoch "
            f"reads some images twice and some not at all"
        ]


def find_resume_point(store: CheckpointManager, config: ExperimentConfig) -> tuple[ResumePoint | None, list[str]]:
    """Find the checkpoint to resume from.

    Args:
        store: the run's checkpoints.
        config: the run's configuration.

    Returns:
        The checkpoint, or None to start from scratch; and a warning for each broken checkpoint.

    Raises:
        ConfigError: if no checkpoint is valid, or it is of another model or run, or already past `train.stop_at`.
    """
    path, warnings = store.find(config.checkpoint.resume)
    if path is None:
        return None, warnings
    if not read_state(path).optimizer:
        raise ConfigError(
            f"{path} holds converted weights and no optimizer state, so it cannot be resumed; start another run from "
            f"these weights: init_from={path.parent.parent}"
        )
    saved = from_yaml((path / "run.yaml").read_text())
    _refuse_another_run(path, saved, config)
    if config.optim.ema is not None and saved.optim.ema is None:
        raise ConfigError(
            f"optim.ema={config.optim.ema}, but {path} holds no average of the weights; set optim.ema=null, or start "
            f"from scratch with another run.name"
        )
    state = read_state(path)
    if config.optim.momentum and not saved.optim.momentum and config.optim.name == saved.optim.name:
        raise ConfigError(
            f"optim.momentum={config.optim.momentum}, but {path} holds no momentum: its run had optim.momentum="
            f"{format_value(saved.optim.momentum)}; set it back, or start another run from its weights: "
            f"init_from={path.parent.parent}"
        )
    stop_at = config.train.stop_at
    if stop_at is not None and stop_at <= state.step:
        raise ConfigError(f"train.stop_at={stop_at} is not after step {state.step} of {path}; raise it or remove it")
    return ResumePoint(path, saved, state), warnings


def _refuse_another_run(path: Path, saved: ExperimentConfig, config: ExperimentConfig) -> None:
    differ = changes(saved, config, Rule.run, Rule.network)
    if differ:
        listed = "; ".join(f"{setting} was {before} and is {now}" for setting, (before, now) in differ.items())
        raise ConfigError(
            f"{path} is of another model or run: {listed}. Set them back to continue, or choose another run.name to "
            f"start from scratch, or with init_from={path} from these weights"
        )
