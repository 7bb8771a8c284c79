"""What is reported, and how often."""

from dataclasses import dataclass

from megavit.errors import ConfigError
from megavit.validation import require_number


@dataclass
class MetricsConfig:
    """Group `metrics`.

    Attributes:
        log_every: steps between lines of the log; each costs one wait for the device.
        tensorboard: also write TensorBoard's event files.
        wandb: project of Weights & Biases to report to as well; null for none. The run's id stays in its folder, so
            that a resumed run goes on in the same curves. Owner and mode are WANDB_ENTITY and WANDB_MODE=offline.
        pictures_every: steps between pictures of what the network makes of some validation images, and one at the
            end; null for none. Only tasks with something to see, a masked autoencoder for one.
    """

    log_every: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    pictures_every: int | None = None

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        if self.wandb is not None and (not self.wandb or "/" in self.wandb):
            raise ConfigError(f"metrics.wandb={self.wandb!r} must be a project's name; its owner is WANDB_ENTITY")
        require_number("metrics", self, "log_every", "pictures_every", at_least=1)
