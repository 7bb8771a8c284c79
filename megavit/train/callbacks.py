"""Define the report that the trainer passes to callbacks at the end of each step, and import callbacks by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megavit.errors import ConfigError
from megavit.plugins import import_plugin


@dataclass(frozen=True)
class StepReport:
    """One training step on this rank.

    Attributes:
        step: steps done, this one included.
        sums: the task's sums over this rank's micro batches; empty except on the last pipeline stage.
        grad_norm: gradient norm before clipping.
        skipped: why the weights were not updated; None if they were.
    """

    step: int
    sums: dict[str, Tensor]
    grad_norm: float
    skipped: str | None


StepCallback = Callable[[StepReport], object]


class HasOnStepEnd(Protocol):
    """An object that is called at the end of each step."""

    def on_step_end(self, report: StepReport) -> object:
        """Take a step's report; what it returns is ignored."""


Callback = StepCallback | HasOnStepEnd | type[HasOnStepEnd]


def open_callback(name: str) -> Callable[[StepReport], object]:
    """Import a callback of `train.callbacks`: a function, or an object or a class with a method `on_step_end`.

    Args:
        name: `package.module:name`.

    Raises:
        ConfigError: if it does not exist, or is none of these.
    """
    found: Any = import_plugin(name, "train.callbacks")
    if isinstance(found, type):
        found = found()
    call = getattr(found, "on_step_end", found)
    if not callable(call):
        raise ConfigError(
            f"train.callbacks: {name} is a {type(found).__name__}; a function is needed, or an object with a method "
            f"on_step_end"
        )
    return call
