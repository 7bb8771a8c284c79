"""When to save, and what to start from."""

from dataclasses import dataclass

from megavit.errors import ConfigError
from megavit.validation import require_number, require_steps


@dataclass
class CheckpointConfig:
    """Group `checkpoint`.

    Attributes:
        save_every: steps between saves; null saves at the end alone, auto once an epoch and at most 50 times a run.
        resume: `auto` goes on from the newest checkpoint of the run if there is one, `never` starts anew in a run
            folder without checkpoints, a path starts from that checkpoint or run; once the run has a checkpoint of its
            own it goes on from that, so that a restarted job does not fall back.
        keep_last: of the checkpoints that were due, so many of the newest stay; null keeps all.
        keep_every: checkpoints of steps that this divides stay too; null spares none.
        async_save: the training goes on while a checkpoint is written; it waits for its copy in memory alone.
            The last one of a run, and one that follows before the one before is written, are waited for.
        best: an evaluation better than every one before it saves, and `checkpoints/best` names that checkpoint; the one
            before is removed, unless it was due anyway.
    """

    save_every: int | str | None = None
    resume: str = "auto"
    keep_last: int | None = None
    keep_every: int | None = None
    async_save: bool = False
    best: bool = True

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        require_steps("checkpoint", self, "save_every", at_least=1)
        require_number("checkpoint", self, "keep_last", "keep_every", at_least=1)
        if self.keep_every is not None and self.keep_last is None:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} would be ignored: checkpoint.keep_last=null keeps all; set "
                f"checkpoint.keep_last too"
            )
