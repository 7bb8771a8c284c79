"""Train the runs of a sweep, several at a time, until all have ended or a signal asks to stop."""

import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from megavit.runtime.signals import HELD_BACK, STACK
from megavit.train.sweep.console import SweepConsole
from megavit.train.sweep.machine import Slot
from megavit.train.sweep.plan import PlannedRun
from megavit.train.sweep.process import RunProcess
from megavit.train.sweep.results import Outcome, Status
from megavit.train.sweep.table import SweepTable

TRAIN = (sys.executable, "-m", "megavit", "train")
_POLL_S = 0.2
# The third signal that asks to stop ends the runs.
_PATIENCE = 3


class RunQueue(Protocol):
    """Where the runs of a sweep come from."""

    def next(self) -> PlannedRun | None:
        """Return the next run to start; None if none is left now."""
        ...

    def should_prune(self, run: PlannedRun) -> bool:
        """Return whether a run that trains should be stopped because others are better."""
        ...

    def end(self, run: PlannedRun, outcome: Outcome) -> Outcome:
        """Take note of a run's end, and return its outcome for the table."""
        ...


class GridQueue(RunQueue):
    """Every combination of values, in the order of the command line.

    Args:
        runs: those that have not finished.
    """

    def __init__(self, runs: list[PlannedRun]) -> None:
        self._runs = deque(runs)

    def next(self) -> PlannedRun | None:
        """Return the next run; None if none is left."""
        return self._runs.popleft() if self._runs else None

    def should_prune(self, run: PlannedRun) -> bool:
        """Return False: each combination trains to its end."""
        return False

    def end(self, run: PlannedRun, outcome: Outcome) -> Outcome:
        """Return the outcome as it is."""
        return outcome


class SweepRunner:
    """Start runs, hand signals on to them and record how they end.

    Args:
        queue: the runs.
        slots: parts of the machine; as many runs train at the same time.
        table: the sweep's table.
        console: the sweep's console.
        program: the words of a run's command line before its settings.
    """

    def __init__(
        self,
        queue: RunQueue,
        *,
        slots: list[Slot],
        table: SweepTable,
        console: SweepConsole,
        program: Sequence[str] = TRAIN,
    ) -> None:
        self._program = program
        self._queue, self._free, self._table, self._console = queue, list(slots), table, console
        self._running: list[RunProcess] = []
        self._asked = 0

    def run(self) -> bool:
        """Train until no run is left.

        Returns:
            Whether a signal has asked to stop.
        """
        while True:
            while self._free and not self._asked and (run := self._queue.next()) is not None:
                self._start(run)
            if not self._running:
                return self._asked > 0
            time.sleep(_POLL_S)
            self._handle_signals()
            for process in list(self._running):
                if process.returncode is not None:
                    self._end(process)
                elif not process.is_pruned and not self._asked and self._queue.should_prune(process.run):
                    process.is_pruned = True
                    process.send(signal.SIGTERM)
            self._console.show(self._running)

    def _start(self, run: PlannedRun) -> None:
        process = RunProcess(run, self._free.pop(0), program=self._program)
        self._running.append(process)
        self._table.add(run.name, run.varied, Outcome(Status.running))
        self._table.write()
        self._console.started(run.name, self._table.number(run.name))

    def _end(self, process: RunProcess) -> None:
        self._running.remove(process)
        self._free.append(process.slot)
        outcome = process.outcome()
        if self._asked and outcome.status is Status.failed:
            # A second signal ends a run before it has saved.
            outcome = replace(outcome, status=Status.stopped, reason="")
        outcome = self._queue.end(process.run, outcome)
        self._table.set(process.run.name, outcome)
        self._console.ended(process.run.name, self._table.number(process.run.name), outcome, process.seconds)

    def _handle_signals(self) -> None:
        for number in signal.sigpending() & set(HELD_BACK):
            signal.sigwait([number])
            if number != STACK:
                self._asked += 1
                if self._asked == 1:
                    self._console.say(f"asked to stop by {signal.Signals(number).name}: the runs save and stop")
            for process in self._running:
                process.send(signal.SIGKILL if self._asked >= _PATIENCE and number != STACK else number)
