"""Settings of the metrics: where they are written, and how often."""

from dataclasses import dataclass

from megavit.errors import ConfigError
from megavit.validation import require_number


@dataclass
class MetricsConfig:
    """Group `metrics`.

    Attributes:
        log_every: steps between lines of the log; each line waits once for the device.
        tensorboard: whether to write TensorBoard's event files too.
        wandb: project of Weights & Biases to report to; null for none. The run's folder stores the run's id, so that a
            resumed run continues the same curves. The environment variables WANDB_ENTITY and WANDB_MODE=offline set
            owner and mode.
        pictures_every: steps between pictures of the network's output for some validation images, with another at the
            end; null for none. Only for tasks that make pictures, such as a masked autoencoder.
    """

    log_every: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    pictures_every: int | None = None

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        if self.wandb is not None and (not self.wandb or "/" in self.wandb):
            raise ConfigError(f"metrics.wandb={self.wandb!r} must be a project's name; its owner is WANDB_ENTITY")
        require_number("metrics", self, "log_every", "pictures_every", at_least=1)
