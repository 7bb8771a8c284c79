"""`state.json` of a checkpoint: where the run stood, in a schema that has a version."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megavit.data.class_names import are_numbers
from megavit.errors import ConfigError, printable

SCHEMA_VERSION = 3
_FILE = "state.json"

# From each version to the next. 1 had no manifest beside it, and classes and due came while it stood. 2 shuffled the
# samples otherwise.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda fields: {"classes": [], "due": True, **fields},
    2: lambda fields: {**fields, "former_order": True},
}


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
        former_order: written when samples came in another order than they do now.
        assumed: settings that no file stated where the weights were converted from.
    """

    step: int
    consumed_samples: int
    metrics: dict[str, float]
    classes: list[str] = field(default_factory=list)
    due: bool = True
    optimizer: bool = True
    num_samples: int = 0
    former_order: bool = False
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


def schema_version(checkpoint: Path) -> int:
    """The version that a checkpoint's `state.json` states.

    Raises:
        ConfigError: if it cannot be read.
    """
    return _read(checkpoint)[0]


def read_state(checkpoint: Path) -> TrainingState:
    """Read where a checkpoint stands, of this schema version or an earlier one.

    Raises:
        ConfigError: if it cannot be read, or a later megavit wrote it.
    """
    version, fields = _read(checkpoint)
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{checkpoint} has schema version {version} and this megavit reads up to {SCHEMA_VERSION}; use the megavit "
            f"that wrote it"
        )
    for older in range(version, SCHEMA_VERSION):
        fields = _MIGRATIONS[older](fields)
    try:
        # Of a folder whose name is no UTF-8 earlier versions kept the bytes.
        return TrainingState(**{**fields, "classes": list(map(printable, fields.get("classes", [])))})
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
