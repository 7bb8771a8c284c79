"""What a sweep prints: one line for each run, and on a terminal a live line for each run that trains."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megavit.train.sweep.process import RunProcess
from megavit.train.sweep.results import Outcome, Status, last_step

_STYLES = {Status.failed: "red", Status.stopped: "yellow", Status.pruned: "yellow"}


class SweepConsole:
    """The console of a sweep.

    Args:
        total: number of runs.
        width: of the longest name.
    """

    def __init__(self, *, total: int, width: int) -> None:
        self._total, self._width = total, width
        self._console = Console(soft_wrap=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._numbers: dict[str, int] = {}

    def __enter__(self) -> "SweepConsole":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str, **style: Any) -> None:
        """Print a line."""
        self._console.print(Text(text, **style))

    def started(self, name: str, number: int) -> None:
        """Report the start of a run; on a terminal its live line does."""
        self._numbers[name] = number
        if not self._console.is_terminal:
            self.say(f"{self._label(name)}  started")

    def ended(self, name: str, number: int, outcome: Outcome, seconds: float | None) -> None:
        """Report how a run ended.

        Args:
            name: of the run.
            number: its place in the sweep, from 1.
            outcome: what it has reached.
            seconds: of this start; None if it had finished before.
        """
        self._numbers[name] = number
        time = "earlier" if seconds is None else f"in {format_time(seconds)}"
        line = f"{self._label(name)}  {outcome.status.value:<8} {time:>10}  {describe(outcome)}"
        self.say(line.rstrip(), style=_STYLES.get(outcome.status, ""))

    def show(self, running: list[RunProcess]) -> None:
        """Refresh the live lines."""
        if not self._console.is_terminal:
            return
        lines = []
        for process in running:
            steps = process.run.config.train.steps
            of = f" of {steps}" if steps is not None else ""
            lines.append(
                f"{self._label(process.run.name)}  running  {format_time(process.seconds):>10}  "
                f"step {last_step(process.run.dir)}{of}"
            )
        self._live.update(Text("\n".join(lines), style="cyan", no_wrap=True, overflow="ellipsis"), refresh=True)

    def _label(self, name: str) -> str:
        count = len(str(self._total))
        return f"{self._numbers[name]:>{count}}/{self._total}  {name:<{self._width}}"


def describe(outcome: Outcome) -> str:
    """Return a run's result, or the first sentence of the reason of its failure."""
    if outcome.status is Status.failed:
        return outcome.reason.partition(". ")[0].partition("; ")[0]
    reached = f"step {outcome.steps}"
    if outcome.best is None:
        return reached
    loss = f", validation loss {outcome.val_loss:.4f}" if outcome.val_loss is not None else ""
    return f"{reached}, best {outcome.metric} {outcome.best:.4f}, last {outcome.last:.4f}{loss}"


def format_time(seconds: float) -> str:
    """Return hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
