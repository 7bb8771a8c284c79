"""Read and write `state.json` of a checkpoint: the training state, in a versioned schema."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megavit.data.class_names import are_numbers
from megavit.errors import ConfigError

SCHEMA_VERSION = 3
_FILE = "state.json"
# Fields of schema 3 that some checkpoints have and nothing reads.
_REMOVED = ("former_order",)


@dataclass(frozen=True)
class TrainingState:
    """The state of a run. Together with the configuration it determines data order, dropout and schedule.

    Attributes:
        step: optimizer steps done.
        consumed_samples: training images consumed.
        metrics: metrics of the last evaluation, for `megavit inspect`.
        classes: names of a classifier's classes, in the order of its scores.
        due: True for a periodic checkpoint; False if it was saved only because its evaluation was the best so far.
        optimizer: whether the checkpoint holds the optimizer's state; False for converted weights.
        num_samples: training images of the source; 0 in converted checkpoints.
        assumed: settings that the files of converted weights did not state.
    """

    step: int
    consumed_samples: int
    metrics: dict[str, float]
    classes: list[str] = field(default_factory=list)
    due: bool = True
    optimizer: bool = True
    num_samples: int = 0
    assumed: list[str] = field(default_factory=list)

    @property
    def names_classes(self) -> bool:
        """Return whether `classes` are names; converted weights without class names have numbers instead."""
        # A trained run has the class names of its data.
        return self.optimizer or not are_numbers(self.classes)


def write_state(checkpoint: Path, state: TrainingState) -> None:
    """Write `state.json`."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(state)}
    (checkpoint / _FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_state(checkpoint: Path) -> TrainingState:
    """Read a checkpoint's `state.json`.

    Raises:
        ConfigError: if the file cannot be read, or has another schema version.
    """
    version, fields = _read(checkpoint)
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{checkpoint} has schema version {version} and this megavit reads version {SCHEMA_VERSION}; use the "
            f"megavit that wrote it"
        )
    for key in _REMOVED:
        fields.pop(key, None)
    try:
        return TrainingState(**fields)
    except TypeError as error:
        raise ConfigError(f"{checkpoint / _FILE} is broken: {error}") from error


def _read(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    path = checkpoint / _FILE
    try:
        fields = json.loads(path.read_text())
        return int(fields.pop("schema_version")), fields
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is broken: {error}") from error
