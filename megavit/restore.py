"""Where a run goes on: its checkpoint, and whether that is of the same model and run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megavit.checkpoint.state import TrainingState, read_state
from megavit.checkpoint.store import CheckpointStore
from megavit.checks import shown
from megavit.compose import from_yaml, leaves
from megavit.config import RunConfig
from megavit.errors import ConfigError

# Of the model, what may change between two parts of a run: it changes neither the weights' shapes nor their meaning.
_MAY_CHANGE = ("dropout", "drop_path", "attention", "linears", "head_bias", "head_std", "layer_scale")

_TASK_MAY_CHANGE = ("label_smoothing", "loss", "class_weights", "baseline_samples")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from.

    Attributes:
        path: its folder.
        config: what it was made with.
        state: where it stands.
    """

    path: Path
    config: RunConfig
    state: TrainingState

    def told_of_data(self, num_samples: int) -> list[str]:
        """What the user must know of a run that goes on with so many training images."""
        before = self.state.num_samples
        if self.state.former_order and self.state.step:
            return [
                f"{self.path} was saved by an earlier megavit, whose samples came in another order: of this epoch some "
                f"come twice and some not at all"
            ]
        if before in (0, num_samples):
            return []
        return [
            f"the run had {before:,} training images and has {num_samples:,} now: from here on they come in another "
            f"order, and of this epoch some twice and some not at all"
        ]

    def mend_updates(self, optimizer: MegatronOptimizer) -> list[str]:
        """Give Adam its count of updates where an earlier megavit has lost it, and say so.

        It saved the first rank's count, which is 0 where that rank's stages are frozen.
        """
        groups = [group for group in optimizer.param_groups if "step" in group]
        if not groups or any(group["step"] for group in groups) or not self.state.step:
            return []
        for group in groups:
            group["step"] = self.state.step
        return [
            f"{self.path} has lost Adam's count of updates, as an earlier megavit saved it where the first rank trains "
            f"nothing; {self.state.step}, the steps of the run, is taken"
        ]


def find_origin(store: CheckpointStore, config: RunConfig) -> tuple[Origin | None, list[str]]:
    """Find the checkpoint to go on from, None to start anew; and warn of each that is broken.

    Args:
        store: the run's checkpoints.
        config: what the run is to be.

    Raises:
        ConfigError: if no checkpoint is whole, or it is of another model or run, or already where this one would stop.
    """
    path, warnings = store.find(config.checkpoint.resume)
    if path is None:
        return None, warnings
    if not read_state(path).optimizer:
        raise ConfigError(
            f"{path} holds weights alone, as they were converted, and no run to go on; start another run from them: "
            f"init_from={path.parent.parent}"
        )
    saved = from_yaml((path / "run.yaml").read_text())
    _refuse_another_run(path, saved, config)
    if config.optim.ema is not None and saved.optim.ema is None:
        raise ConfigError(
            f"optim.ema={config.optim.ema}, but {path} holds no average of the weights; set optim.ema=null, or start "
            f"anew under another run.name"
        )
    state = read_state(path)
    if config.optim.momentum and not saved.optim.momentum and config.optim.name is saved.optim.name:
        raise ConfigError(
            f"optim.momentum={config.optim.momentum}, but {path} holds no momentum: its run had optim.momentum="
            f"{shown(saved.optim.momentum)}; set it back, or start another run from its weights: "
            f"init_from={path.parent.parent}"
        )
    stop_at = config.train.stop_at
    if stop_at is not None and stop_at <= state.step:
        raise ConfigError(
            f"train.stop_at={stop_at} is not after step {state.step}, where {path} stands; raise it or leave it away"
        )
    return Origin(path, saved, state), warnings


def _refuse_another_run(path: Path, saved: RunConfig, config: RunConfig) -> None:
    ours, theirs = _identity(config), _identity(saved)
    differ = [
        f"{key} {shown(theirs.get(key))} there, {shown(ours.get(key))} here"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]
    if differ:
        raise ConfigError(
            f"{path} is of another model or run: {'; '.join(differ)}. Choose another run.name to start anew, or the "
            f"settings it was made with"
        )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What makes two configurations the same model, in the same order of data."""
    network = {f"model.{key}": value for key, value in leaves(config.model).items() if not key.endswith(_MAY_CHANGE)}
    return {
        **network,
        "model.layer_scale": "none" if config.model.layer_scale is None else "some",
        "data.source": config.data.source,
        "data.classes": config.data.classes,
        "data.samples_per_class": config.data.samples_per_class,
        "data.fraction": config.data.fraction,
        "data.repeats": config.data.repeats,
        "data.class_balanced": config.data.class_balanced,
        "data.multi_label": config.data.multi_label,
        "data.val_fraction": config.data.val_fraction,
        "data.image_size": config.data.image_size,
        "data.channels": config.data.channels,
        "data.num_classes": config.data.num_classes,
        "data.num_samples": config.data.num_samples,
        **{f"task.{key}": value for key, value in leaves(config.task).items() if key not in _TASK_MAY_CHANGE},
        "optim.name": config.optim.name,
        # They decide what the optimizer has state of, and in which groups.
        "optim.freeze": config.optim.freeze,
        "optim.layer_decay": config.optim.layer_decay,
        "run.seed": config.run.seed,
    }
