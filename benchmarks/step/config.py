"""Arguments of `python -m benchmarks.step`: what is measured, and for how long."""

from dataclasses import dataclass, field, fields

from megavit.validation import require_number


@dataclass
class BenchConfig:
    """Arguments of the benchmark.

    Attributes:
        rows: what is measured, by name (see `rows.py`); empty takes those of the device.
        candidates: who takes part, megavit always does; empty takes all.
        batch: images per step; null takes each row's own.
        rounds: how often every candidate has its turn; null takes 3 on a CPU, where a turn is a few seconds, else 7.
            Fewer where the rows to come would not be reached.
        block_s: seconds that a turn lasts at least.
        deadline_s: seconds after which nothing new is begun; what was measured by then stands.
        dir: folder of the figures, the table and the picture.
    """

    rows: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    batch: int | None = None
    rounds: int | None = None
    block_s: float = 0.5
    deadline_s: float = 840.0
    dir: str = "runs/bench"

    def check(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_number("", self, "rounds", "batch", at_least=1)
        require_number("", self, "block_s", at_least=0)
        require_number("", self, "deadline_s", above=0)


KEYS = tuple(part.name for part in fields(BenchConfig))
