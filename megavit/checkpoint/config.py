"""When to save, and what to start from."""

from dataclasses import dataclass

from megavit.checks import require_number


@dataclass
class CheckpointConfig:
    """Group `checkpoint`.

    Attributes:
        every: steps between saves; null saves at the end alone.
        resume: `auto` goes on from the newest checkpoint of the run if there is one, `never` starts anew in a run
            folder without checkpoints, a path starts from that checkpoint or run; once the run has a checkpoint of its
            own it goes on from that, so that a restarted job does not fall back.
        best: an evaluation better than every one before it saves, and `checkpoints/best` names that checkpoint; the one
            before is removed, unless it was due anyway.
    """

    every: int | None = None
    resume: str = "auto"
    best: bool = True

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        require_number("checkpoint", self, "every", at_least=1)
