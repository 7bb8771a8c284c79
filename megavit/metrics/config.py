"""What is reported, and how often."""

from dataclasses import dataclass

from megavit.errors import ConfigError


@dataclass
class MetricsConfig:
    """Group `metrics`.

    Attributes:
        every: steps between lines of the log; each costs one wait for the device.
        tensorboard: also write TensorBoard's event files.
    """

    every: int = 10
    tensorboard: bool = True

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        if self.every < 1:
            raise ConfigError(f"metrics.every={self.every} must be at least 1")
