"""What is reported, and how often."""

from dataclasses import dataclass

from megavit.checks import require_number


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
        require_number("metrics", self, "every", at_least=1)
