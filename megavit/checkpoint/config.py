"""Define the settings of saving, resuming and keeping checkpoints."""

from dataclasses import dataclass

from megavit.errors import ConfigError
from megavit.validation import require_number, require_steps


@dataclass
class CheckpointConfig:
    """Group `checkpoint`.

    Attributes:
        save_every: steps between saves; null saves at the end only, auto once an epoch and at most 50 times a run.
        resume: `auto` resumes from the newest checkpoint of the run if there is one; `never` starts from scratch in a
            run folder without checkpoints; a path resumes from that checkpoint or run. Once the run has saved its first
            checkpoint, it resumes from its own newest one, so that a restarted job does not lose steps.
        keep_last: number of the newest periodic checkpoints to keep; null keeps all.
        keep_every: also keep checkpoints of steps that this divides; null for none.
        async_save: train while a checkpoint is written; training waits only for the copy in memory. It also waits
            for the last checkpoint of a run, and for an earlier checkpoint that is still being written.
        best: save after each evaluation that is better than all before it, and have `checkpoints/best` name that
            checkpoint; the previous best is removed, unless it is a periodic checkpoint.
    """

    save_every: int | str | None = None
    resume: str = "auto"
    keep_last: int | None = None
    keep_every: int | None = None
    async_save: bool = False
    best: bool = True

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        require_steps("checkpoint", self, "save_every", at_least=1)
        require_number("checkpoint", self, "keep_last", "keep_every", at_least=1)
        if self.keep_every is not None and self.keep_last is None:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} would be ignored: checkpoint.keep_last=null keeps all; set "
                f"checkpoint.keep_last too"
            )
