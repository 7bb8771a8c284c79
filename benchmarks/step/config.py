"""Arguments of `python -m benchmarks.step`."""

from dataclasses import dataclass

from megavit.cli.arguments import argument


@dataclass(frozen=True)
class BenchConfig:
    """Arguments of the benchmark.

    Attributes:
        rows: names of the rows to measure (see `cases.py`); empty takes those for the device.
        candidates: names of the candidates to compare with megavit; empty takes all.
        batch: images per step; null takes each row's own.
        rounds: number of rounds, in each of which every candidate is timed once; null takes 3 on a CPU, where a turn
            takes a few seconds, else 7. There are fewer rounds if later rows would not be reached otherwise.
        block_s: shortest duration of a turn, in seconds.
        deadline_s: seconds after which no new measurement begins; earlier ones are reported.
        dir: folder of the figures and the plot.
    """

    rows: tuple[str, ...] = argument((), form="vit_b16:fp32,…")
    candidates: tuple[str, ...] = argument((), form="NAME,…")
    batch: int | None = argument(None, form="N")
    rounds: int | None = argument(None, form="N")
    block_s: float = argument(0.5, at_least=0)
    deadline_s: float = argument(840.0, above=0)
    dir: str = "runs/bench"
