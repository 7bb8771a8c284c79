"""Measure one row: build and check its candidates, then time them in turns."""

import math
import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.step.cases import ON_TWO, ROWS, TP2, BenchmarkCase, overrides_of
from benchmarks.step.config import BenchConfig
from benchmarks.step.parity_check import STEPS, Difference, StepOutput, difference
from benchmarks.step.processes import Fault, WorkerPool

# A call that has begun may exceed the deadline by this much, so that its figure is not lost.
_GRACE_S = 20.0
_CPU_ROUNDS, _GPU_ROUNDS = 3, 7
Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


@dataclass
class Figures:
    """The figures of one candidate.

    Attributes:
        steps: number of steps per turn.
        seconds: seconds per step, of each turn.
        memory: bytes by name.
        kinds: seconds per step by kind of kernel.
        differs: difference from the reference after some steps, of the output relative to its largest value, and of the
            loss relative to itself.
        without: why it was not timed; None if it was.
    """

    steps: int = 1
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    differs: Difference | None = None
    without: str | None = None


@dataclass
class Measured:
    """The figures of one row.

    Attributes:
        name, precision, batch: case, number format, and images per step.
        about: description of the device.
        candidates: figures by candidate.
        rates: the device's own rates, before the first round and after each round.
        reference: the candidate that the others are compared with.
    """

    name: str
    precision: str
    batch: int
    about: dict[str, Any] = field(default_factory=dict)
    candidates: dict[str, Figures] = field(default_factory=dict)
    rates: list[dict[str, float]] = field(default_factory=list)
    reference: str = "megavit"

    @property
    def timed(self) -> dict[str, Figures]:
        """Return the candidates that were timed."""
        return {name: one for name, one in self.candidates.items() if one.seconds}

    @property
    def leader(self) -> str:
        """Return the fastest of megavit's candidates, with which the table compares the others."""
        return self._fastest(ours=True) or self.reference

    @property
    def leaders(self) -> list[str]:
        """Return the fastest of megavit's candidates and the fastest of the others."""
        return [name for name in (self._fastest(ours=True), self._fastest(ours=False)) if name is not None]

    def _fastest(self, *, ours: bool) -> str | None:
        medians = {name: statistics.median(one.seconds) for name, one in self.timed.items() if is_own(name) is ours}
        return min(medians, key=lambda name: medians[name], default=None)

    def ratios(self, name: str, to: str) -> list[float]:
        """Return a candidate's time divided by another's, for each round."""
        mine, theirs = self.candidates[name].seconds, self.candidates[to].seconds
        return [one / other for one, other in zip(mine, theirs, strict=False)]

    def rate(self, name: str) -> float:
        """Return the median of one of the device's own rates."""
        return statistics.median(rates[name] for rates in self.rates) if self.rates else math.nan

    @property
    def drift(self) -> float:
        """Return the ratio of the device's largest to its smallest matmul rate, minus 1."""
        found = [rates["matmul_flops"] for rates in self.rates]
        return max(found) / min(found) - 1 if found else math.nan


def is_own(name: str) -> bool:
    """Return whether a candidate is one of megavit's."""
    return name.startswith(("megavit", "trainer"))


def taking_part(label: str, config: BenchConfig, *, device: str) -> list[str]:
    """Return the candidates of a row, its reference first: those of `config.candidates`, oneDNN only for fp32 on a CPU.

    Args:
        label: NAME:PRECISION.
        config: the benchmark's arguments.
        device: cpu or cuda.
    """
    name, precision = label.split(":")
    wanted, (reference, *_) = config.candidates, ROWS[name].candidates
    onednn_fits = device == "cpu" and precision == "fp32"
    return [
        one
        for one in ROWS[name].candidates
        if (onednn_fits or "onednn" not in one) and (not wanted or one in wanted or one == reference)
    ]


def to_come(rows: list[str], place: int, config: BenchConfig, *, device: str) -> float:
    """Estimate the cost of the later rows at one round each, in units of the current row.

    A candidate costs about as much as the start of a process: building it takes longer than its steps. A candidate in
    fp32 costs one to two times as much as one in bf16; the estimate takes the factor that makes later rows cost more.

    Args:
        rows: all rows as NAME:PRECISION, in their order.
        place: index of the current row.
        config: the benchmark's arguments.
        device: cpu or cuda.
    """

    def cost(label: str) -> int:
        names = taking_part(label, config, device=device)
        processes = 2 if "trainer" in names or any(name.endswith(ON_TWO) for name in names) else 1
        return len(names) + processes

    here_in_bf16 = rows[place].endswith("bf16")
    dearer = [2 if here_in_bf16 and label.endswith("fp32") else 1 for label in rows[place + 1 :]]
    return sum(map(operator.mul, map(cost, rows[place + 1 :]), dearer)) / cost(rows[place])


class RowMeasurement:
    """Measure one row.

    Args:
        label: NAME:PRECISION.
        config: the benchmark's arguments.
        overrides: more settings, as typed.
        device: cpu or cuda.
        until: `time.monotonic()` after which no new measurement begins.
        to_come: cost of the later rows, in units of this one; on a slow machine it reduces the number of rounds.
        say: function that prints progress.
        keep: function that writes a line of figures to the file.
    """

    def __init__(
        self,
        label: str,
        config: BenchConfig,
        overrides: list[str],
        *,
        device: str,
        until: float,
        to_come: float,
        say: Say,
        keep: Keep,
    ) -> None:
        name, precision = label.split(":")
        self.row: BenchmarkCase = ROWS[name]
        batch = config.batch or (self.row.gpu_batch if device == "cuda" else self.row.cpu_batch)
        self.measured = Measured(name, precision, batch, reference=self.row.candidates[0])
        self._overrides = [*overrides_of(self.row, precision, batch), *overrides]
        self._config, self._until, self._say, self._keep = config, until, say, keep
        self._started, self._to_come = time.monotonic(), to_come
        self._rounds = config.rounds or (_CPU_ROUNDS if device == "cpu" else _GPU_ROUNDS)
        self._device, self._label, self._run_dir = device, label, f"{config.dir}/loop"
        self._worlds: dict[str, WorkerPool] = {}

    def run(self) -> Measured:
        """Measure the row; candidates that are not reached before the deadline are reported as such."""
        try:
            self._measure()
        except TimeoutError:
            self._say(f"{self._label}: deadline_s={self._config.deadline_s:g} is over")
        except Fault as error:
            self._say(f"{self._label}: {error}")
        finally:
            for world in {id(world): world for world in self._worlds.values()}.values():
                world.close()
        for figures in self.measured.candidates.values():
            if not figures.seconds and figures.without is None:
                figures.without = "not reached before deadline_s"
        return self.measured

    def _measure(self) -> None:
        names = taking_part(self._label, self._config, device=self._device)
        self.measured.candidates = {name: Figures() for name in names}
        main = WorkerPool(self._overrides)
        self._worlds = dict.fromkeys(names, main)
        split = [name for name in names if name.endswith(ON_TWO)]
        if split:
            self._worlds |= dict.fromkeys(split, WorkerPool([*self._overrides, TP2], ranks=2))
        self.measured.about = self._call(self._worlds[names[0]], "about")
        if "trainer" in names:
            self._measure_loop(main)
            return
        reference: tuple[StepOutput, StepOutput] | None = None
        for name in names:
            reference = self._admit(name, reference)
        self._take_turns()
        # Profile before measuring memory. Measuring memory leaves free blocks of other sizes, and a step that has to
        # allocate from the system spends a fifth of its time in what the profile shows as copies.
        for name in self.measured.leaders:
            kinds = self._call(self._worlds[name], "profile", self._there(name))
            self.measured.candidates[name].kinds = kinds
        for name, figures in self.measured.timed.items():
            figures.memory = self._call(self._worlds[name], "memory", self._there(name))

    def _admit(
        self, name: str, reference: tuple[StepOutput, StepOutput] | None
    ) -> tuple[StepOutput, StepOutput] | None:
        """Build a candidate and compare its outputs with the reference; it is not timed if they differ or it fails."""
        world, there, figures = self._worlds[name], self._there(name), self.measured.candidates[name]
        try:
            start = time.monotonic()
            self._call(world, "build", there)
            before = StepOutput(*self._call(world, "outputs", there))
            seconds = self._call(world, "warm_up", there, STEPS)
            after = StepOutput(*self._call(world, "outputs", there))
            took = time.monotonic() - start
        except Fault as error:
            figures.without = str(error)
            self._say(f"{self._label}: {name}: {error}")
            return reference
        if reference is None:
            reference = (before, after)
        precision = self.measured.precision
        before_they = difference(before, reference[0])
        figures.differs = difference(after, reference[1])
        if not all(one is not None and one.is_small(precision) for one in (before_they, figures.differs)):
            figures.without = (
                f"its results differ: {before_they or 'its output has another shape'}, then {figures.differs}"
            )
            self._call(world, "drop", there)
        figures.steps = max(1, math.ceil(self._config.block_s / seconds))
        self._say(
            f"{self._label}: {name}: {figures.without or f'ready after {took:.0f} s, a step takes {seconds:.3g} s'}"
        )
        return reference

    def _take_turns(self) -> None:
        names = [name for name, figures in self.measured.candidates.items() if figures.without is None]
        machine = self._worlds[names[0]]
        self.measured.rates.append(self._call(machine, "rates"))
        with_one_round = 0.0
        for number in range(self._rounds):
            began = time.monotonic()
            # Rotate the order.
            turn = number % len(names)
            round_s = {}
            for name in names[turn:] + names[:turn]:
                figures = self.measured.candidates[name]
                spent = self._call(self._worlds[name], "run", self._there(name), figures.steps)
                round_s[name] = spent / figures.steps
            # Add complete rounds only, so that compared times were measured close to each other.
            for name, seconds in round_s.items():
                self.measured.candidates[name].seconds.append(seconds)
            self.measured.rates.append(self._call(machine, "rates"))
            self._keep({"kind": "round", "row": self._label, "seconds": round_s, **self.measured.rates[-1]})
            now = time.monotonic()
            round_took = now - began
            # The profile and the memory measurement that follow take about as long as a round.
            with_one_round = with_one_round or now - self._started + round_took
            then = now + 2 * round_took + self._to_come * with_one_round
            if number + 1 < self._rounds and then > self._until:
                self._say(f"{self._label}: {number + 1} of {self._rounds} rounds, so that every row has one")
                return

    def _measure_loop(self, world: WorkerPool) -> None:
        self._call(world, "build", "megavit")
        seconds = self._call(world, "warm_up", "megavit", STEPS)
        self.measured.rates.append(self._call(world, "rates"))
        steps = max(1, math.ceil(self._config.block_s / seconds))
        found = self._call(world, "loop", self._run_dir, self._rounds, steps, self._until)
        self.measured.rates.append(self._call(world, "rates"))
        for name, spent in found.items():
            self.measured.candidates[name] = Figures(steps, [one / steps for one in spent])

    def _there(self, name: str) -> str:
        """Return a candidate's name within its worker pool."""
        return name.removesuffix(ON_TWO)

    def _call(self, world: WorkerPool, name: str, *arguments: Any) -> Any:
        if time.monotonic() > self._until:
            raise TimeoutError
        return world.call(name, *arguments, until=self._until, patience_s=_GRACE_S)
