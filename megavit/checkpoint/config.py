"""When to save, and what to start from."""

from dataclasses import dataclass

from megavit.errors import ConfigError


@dataclass
class CheckpointConfig:
    """Group `checkpoint`.

    Attributes:
        every: steps between saves; null saves at the end alone.
        resume: `auto` goes on from the newest checkpoint of the run if there is one, `never` starts anew in a run
            folder without checkpoints, a path goes on from that checkpoint.
    """

    every: int | None = None
    resume: str = "auto"

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        if self.every is not None and self.every < 1:
            raise ConfigError(f"checkpoint.every={self.every} must be at least 1, or null to save at the end alone")
