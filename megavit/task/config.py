"""What is learned."""

from dataclasses import dataclass

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
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={self.label_smoothing} must be in [0, 1)")
