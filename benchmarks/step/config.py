"""Arguments of `python -m benchmarks.step`: what is measured, and for how long."""

from dataclasses import dataclass

from megavit.cli.arguments import argument


@dataclass(frozen=True)
class BenchConfig:
    """Arguments of the benchmark.

    Attributes:
        rows: what is measured, by name (see `cases.py`); empty takes those of the device.
        candidates: which candidates are timed beside megavit; empty takes all.
        batch: images per step; null takes each row's own.
        rounds: how often every candidate has its turn; null takes 3 on a CPU, where a turn is a few seconds, else 7.
            Fewer where the rows to come would not be reached.
        block_s: seconds that a turn lasts at least.
        deadline_s: seconds after which nothing new is begun; what was measured by then stays.
        dir: folder of the figures, the table and the picture.
    """

    rows: tuple[str, ...] = argument((), form="vit_b16:fp32,…")
    candidates: tuple[str, ...] = argument((), form="NAME,…")
    batch: int | None = argument(None, form="N")
    rounds: int | None = argument(None, form="N")
    block_s: float = argument(0.5, at_least=0)
    deadline_s: float = argument(840.0, above=0)
    dir: str = "runs/bench"
