"""What is learned."""

from dataclasses import dataclass

from megavit.checks import require_number
from megavit.errors import ConfigError


@dataclass
class TaskConfig:
    """Group `task`.

    Attributes:
        name: the task.
        label_smoothing: probability spread over all classes, in [0, 1).
    """

    name: str = "classify"
    label_smoothing: float = 0.0

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        if self.name != "classify":
            raise ConfigError(f"task.name={self.name} is not known; known: classify")
        require_number("task", self, "label_smoothing", at_least=0, below=1)
