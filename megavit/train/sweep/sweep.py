"""Run a sweep: plan it, train its runs, write `sweep.csv` and `sweep.png`, print the best run."""

import shlex
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megavit.config.compose import fix_start_time
from megavit.config.sweep import SweepRun, SweptSetting, base_name, expand, read_sweep
from megavit.errors import DISK_ERRORS, ConfigError
from megavit.runtime.run_dir import FAULT, FINISHED, STOPPED, lock_folder
from megavit.runtime.signals import HELD_BACK
from megavit.train.sweep.console import SweepConsole, describe
from megavit.train.sweep.machine import Slot, divide_machine
from megavit.train.sweep.options import Sampler, SweepOptions
from megavit.train.sweep.optuna_queue import OptunaQueue, require_optuna, space_corners
from megavit.train.sweep.plan import PlannedRun, plan_run, plan_runs, refuse_own_folders
from megavit.train.sweep.process import wait_for_folders
from megavit.train.sweep.results import Outcome, Status, read_outcome
from megavit.train.sweep.runner import TRAIN, GridQueue, SweepRunner
from megavit.train.sweep.table import SweepTable, draw_sweep


def run_sweep(overrides: list[str], options: SweepOptions, *, program: Sequence[str] = TRAIN) -> int:
    """Train a run for each combination of values.

    A sweep that was interrupted is continued: finished runs stay, stopped ones resume from their checkpoints.

    Args:
        overrides: settings with one or several values, as typed.
        options: how the sweep is run.
        program: the words of a run's command line before its settings.

    Returns:
        The exit code: 0 if every run has finished, 1 if one has failed, 75 if the sweep was stopped.

    Raises:
        ConfigError: if a run is wrong; nothing is started then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    refuse_own_folders(overrides)
    settings = read_sweep(fix_start_time(overrides))
    is_search = options.sampler is Sampler.optuna
    if is_search:
        require_optuna()
    combinations = space_corners(settings) if is_search else expand(settings)
    sweep_dir = options.dir or _default_dir(combinations[0])
    slots = divide_machine(options.parallel)
    runs = plan_runs(combinations, sweep_dir, slot=slots[0])
    if options.list_only:
        for run in runs:
            print(f"{run.dir}  {shlex.join(f'{key}={value}' for key, value in run.varied.items())}")
        return FINISHED
    with lock_folder(sweep_dir, setting="sweep.dir", instead="sweep.dir"):
        table = SweepTable(sweep_dir / "sweep.csv", list(combinations[0].varied))
        try:
            if is_search:
                return _search(settings, options, sweep_dir, slots=slots, table=table, program=program)
            return _train_grid(runs, sweep_dir, slots=slots, table=table, program=program)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            # The runs save and stop when this process ends.
            raise ConfigError(
                f"sweep.dir={sweep_dir} cannot be written: {error.strerror}; make room and repeat the command"
            ) from error


def _train_grid(
    runs: list[PlannedRun], sweep_dir: Path, *, slots: list[Slot], table: SweepTable, program: Sequence[str]
) -> int:
    console = SweepConsole(total=len(runs), width=max(len(run.name) for run in runs))
    console.say(_introduce(len(runs), sweep_dir, len(slots)))
    with console:
        wait_for_folders([run.dir for run in runs], say=console.say)
        remaining = _add_runs(runs, table, console)
        queue = GridQueue(remaining)
        asked = SweepRunner(queue, slots=slots, table=table, console=console, program=program).run()
    return _conclude({run.name: run.overrides for run in runs}, table, console, sweep_dir, asked=asked)


def _search(
    settings: list[SweptSetting],
    options: SweepOptions,
    sweep_dir: Path,
    *,
    slots: list[Slot],
    table: SweepTable,
    program: Sequence[str],
) -> int:
    console = SweepConsole(total=options.trials or 0, width=8 + max(len(run.name) for run in space_corners(settings)))
    console.say(_introduce(options.trials or 0, sweep_dir, len(slots)))
    with console:
        wait_for_folders(sorted(path.parent for path in sweep_dir.glob("*/.sweep.lock")), say=console.say)
        plan = partial(plan_run, sweep_dir=sweep_dir, slot=slots[0])
        queue = OptunaQueue(settings, options, sweep_dir, plan=plan, table=table)
        for number, (name, outcome) in enumerate(table.outcomes.items(), 1):
            console.ended(name, number, outcome, None)
        asked = SweepRunner(queue, slots=slots, table=table, console=console, program=program).run()
    return _conclude(queue.overrides, table, console, sweep_dir, asked=asked)


def _default_dir(run: SweepRun) -> Path:
    """Return multirun/NAME, NAME being what a run without the sweep would have."""
    is_named = "run.name" not in run.varied
    return Path("multirun") / base_name(
        [text for text in run.overrides if is_named or not text.startswith("run.name=")]
    )


def _add_runs(runs: list[PlannedRun], table: SweepTable, console: SweepConsole) -> list[PlannedRun]:
    """Add the runs to the table, and return those that have not finished."""
    remaining = []
    for number, run in enumerate(runs, 1):
        if run.is_finished:
            outcome = read_outcome(run.dir)
            console.ended(run.name, number, outcome, None)
        else:
            outcome = Outcome(Status.pending)
            remaining.append(run)
        table.add(run.name, run.varied, outcome)
    table.write()
    return remaining


def _introduce(count: int, sweep_dir: Path, parallel: int) -> str:
    at_a_time = "one at a time" if parallel == 1 else f"{parallel} at a time"
    return f"sweep of {count} runs, {at_a_time}, in {sweep_dir}; what a run prints is in {sweep_dir}/RUN/console.log"


def _conclude(
    overrides: dict[str, list[str]], table: SweepTable, console: SweepConsole, sweep_dir: Path, *, asked: bool
) -> int:
    """Draw the picture, print the summary, and return the exit code."""
    table.write()
    statuses = [outcome.status for outcome in table.outcomes.values()]
    counts = {status: statuses.count(status) for status in Status if status in statuses}
    console.say(", ".join(f"{count} {status.value}" for status, count in counts.items()))
    for name, outcome in table.outcomes.items():
        if outcome.status is Status.failed:
            console.say(f"  {name} failed: {describe(outcome)}", style="red")
    best = table.best()
    if best is not None:
        draw_sweep(table, sweep_dir / "sweep.png")
        repeat = [text for text in overrides[best] if not text.startswith(("run.dir=", "--start-time="))]
        console.say(f"best: {best}, {describe(table.outcomes[best])}; to repeat it:")
        console.say(f"  megavit train {shlex.join(repeat)}")
        console.say(f"table {sweep_dir / 'sweep.csv'}, picture {sweep_dir / 'sweep.png'}")
    else:
        console.say(f"table {sweep_dir / 'sweep.csv'}")
    if asked or Status.stopped in counts or Status.pending in counts:
        console.say("the same command continues the sweep")
        return STOPPED
    return FAULT if Status.failed in counts else FINISHED
