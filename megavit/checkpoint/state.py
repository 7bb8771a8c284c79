"""`state.json` of a checkpoint: where the run stood, in a schema that has a version."""

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
    """Where a run stands; with the configuration, all that data order, dropout and schedule depend on.

    Attributes:
        step: optimizer steps done.
        consumed_samples: images seen.
        metrics: the last evaluation's, for whoever inspects the checkpoint.
        classes: names of a classifier's classes, in the order of its scores.
        due: saved at its time; else only because it evaluated better than all before.
        optimizer: whether its state is there too; not in what was converted from elsewhere.
        num_samples: training images of the source; 0 where nobody wrote it down.
        assumed: settings that no file stated where the weights were converted from.
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
        """Whether `classes` are names; in what was converted they may be numbers for want of names."""
        # What has trained here had its names from its data.
        return self.optimizer or not are_numbers(self.classes)


def write_state(checkpoint: Path, state: TrainingState) -> None:
    """Write `state.json`."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(state)}
    (checkpoint / _FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_state(checkpoint: Path) -> TrainingState:
    """Read a checkpoint's `state.json`.

    Raises:
        ConfigError: if it cannot be read, or is of another schema version.
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
