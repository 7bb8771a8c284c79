"""What is reported, and how often."""

from dataclasses import dataclass

from megavit.checks import require_number


@dataclass
class MetricsConfig:
    """Group `metrics`.

    Attributes:
        every: steps between lines of the log; each costs one wait for the device.
        tensorboard: also write TensorBoard's event files.
        pictures_every: steps between pictures of what the network makes of some validation images, and one at the
            end; null for none. Only tasks with something to see, a masked autoencoder for one.
    """

    every: int = 10
    tensorboard: bool = True
    pictures_every: int | None = None

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        require_number("metrics", self, "every", "pictures_every", at_least=1)
