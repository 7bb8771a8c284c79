"""A sweep whose values Optuna draws: the sampler learns from the validation metric, the pruner stops bad runs early."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavit.config.sweep import Interval, SweepRun, SweptSetting, name_run
from megavit.errors import ConfigError
from megavit.metrics.rows import without_repeated
from megavit.train.sweep.options import Pruner, SweepOptions
from megavit.train.sweep.plan import PlannedRun
from megavit.train.sweep.results import Outcome, Status, lines_of, monitored, read_outcome
from megavit.train.sweep.runner import RunQueue
from megavit.train.sweep.table import SweepTable

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

# Digits of a number that is drawn: a setting is readable, and the run's name too.
_DIGITS = 5


class OptunaQueue(RunQueue):
    """The runs that Optuna asks for.

    The study is a file in the sweep's folder. The sampler is seeded for each trial by the trial's number, so that a
    sweep that was interrupted draws the same values as one that was not.

    Args:
        settings: settings with one value, several, or an interval.
        options: trials, seed and pruner.
        sweep_dir: the sweep's folder, locked by this process.
        plan: composes and checks a run.
        table: the sweep's table; trials of an earlier start are added to it.

    Attributes:
        overrides: the settings of each run by its name.

    Raises:
        ConfigError: if Optuna is missing, or the folder holds a search over other values.
    """

    def __init__(
        self,
        settings: list[SweptSetting],
        options: SweepOptions,
        sweep_dir: Path,
        *,
        plan: Callable[[SweepRun], PlannedRun],
        table: SweepTable,
    ) -> None:
        self._settings, self._options, self._plan, self._table = settings, options, plan, table
        self._study = _open_study(sweep_dir / "optuna.journal", options)
        self._refuse_another_search(sweep_dir)
        self._trials: dict[str, Trial] = {}
        self.overrides: dict[str, list[str]] = {}
        # Sizes of the metrics files when they were last read.
        self._read: dict[str, int] = {}
        self._pruned_at: dict[str, int] = {}
        self._unfinished = self._read_earlier_trials()

    def next(self) -> PlannedRun | None:
        """Return the run of an interrupted trial, else of a new one; None if all trials have been drawn."""
        from optuna.trial import TrialState

        while self._unfinished or len(self._study.trials) < (self._options.trials or 0):
            trial = self._resume_trial() if self._unfinished else self._new_trial()
            run = self._draw(trial)
            try:
                planned = self._plan(run)
            except ConfigError as error:
                outcome = Outcome(Status.failed, reason=str(error))
                self._tell(trial, outcome, TrialState.FAIL)
                self._table.add(run.name, run.varied, outcome)
                continue
            self._trials[planned.name], self.overrides[planned.name] = trial, planned.overrides
            trial.set_user_attr("overrides", planned.overrides)
            return planned
        return None

    def should_prune(self, run: PlannedRun) -> bool:
        """Report new evaluations of a run, and return whether it is worse than the median of the others."""
        if run.name in self._pruned_at:
            return True
        metrics_file = run.dir / "metrics.jsonl"
        size = metrics_file.stat().st_size if metrics_file.exists() else 0
        if self._read.get(run.name, 0) == size:
            return False
        self._read[run.name] = size
        evaluations = without_repeated(lines_of(metrics_file), "val")
        metric, higher = monitored(run.dir, evaluations)
        trial = self._trials[run.name]
        reported = self._study.trials[trial.number].intermediate_values
        for row in evaluations:
            value, step = row.get(metric), row["step"]
            if value is None or step < max(reported, default=0) or step == run.config.train.steps:
                continue
            if step not in reported:
                trial.report(value if higher else -value, step)
                reported = {**reported, step: value}
            if trial.should_prune():
                self._pruned_at[run.name] = step
                return True
        return False

    def end(self, run: PlannedRun, outcome: Outcome) -> Outcome:
        """Tell Optuna the best value of a run that has ended; a stopped one is continued by the next start."""
        from optuna.trial import TrialState

        # A short run may have ended before its evaluations were read: the decision is the same.
        if outcome.status is not Status.failed:
            self.should_prune(run)
        step = self._pruned_at.get(run.name)
        if step is not None and not (outcome.status is Status.finished and step == outcome.steps):
            outcome = replace(read_outcome(run.dir, until_step=step), status=Status.pruned, reason="")
        if outcome.status is Status.stopped:
            return outcome
        if outcome.status is Status.finished and outcome.best is None:
            reason = "no validation metric, which Optuna needs: the data has no validation images"
            outcome = replace(outcome, status=Status.failed, reason=reason)
        states = {Status.finished: TrialState.COMPLETE, Status.pruned: TrialState.PRUNED}
        self._tell(self._trials[run.name], outcome, states.get(outcome.status, TrialState.FAIL))
        return outcome

    def _tell(self, trial: "Trial", outcome: Outcome, state: Any) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("outcome", {**asdict(outcome), "status": outcome.status.value})
        sign = 1 if outcome.higher else -1
        is_complete = state is TrialState.COMPLETE and outcome.best is not None
        self._study.tell(trial, sign * outcome.best if is_complete and outcome.best is not None else None, state=state)

    def _new_trial(self) -> "Trial":
        from optuna.samplers import TPESampler

        number = len(self._study.trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.sampler = TPESampler(seed=self._options.seed + number, constant_liar=self._options.parallel > 1)
        return self._study.ask()

    def _resume_trial(self) -> "Trial":
        from optuna.trial import Trial

        return Trial(self._study, self._unfinished.pop(0)._trial_id)

    def _draw(self, trial: "Trial") -> SweepRun:
        """Return the run of a trial; values that were drawn by an earlier start are read."""
        overrides = [_draw_value(trial, setting) for setting in self._settings]
        run = name_run(overrides, [setting.key for setting in self._settings if setting.is_swept])
        run = replace(run, name=f"{trial.number:03}-{run.name}")
        trial.set_user_attr("name", run.name)
        trial.set_user_attr("varied", run.varied)
        return run

    def _read_earlier_trials(self) -> list["FrozenTrial"]:
        """Add the trials of an earlier start to the table, and return those that have not ended."""
        unfinished = []
        for trial in self._study.trials:
            kept = trial.user_attrs
            if "outcome" in kept and trial.state.is_finished():
                outcome = Outcome(**{**kept["outcome"], "status": Status(kept["outcome"]["status"])})
                self._table.add(kept["name"], kept["varied"], outcome)
                self.overrides[kept["name"]] = kept.get("overrides", [])
            elif not trial.state.is_finished():
                unfinished.append(trial)
        return unfinished

    def _refuse_another_search(self, sweep_dir: Path) -> None:
        # The time of a start, which ${now:…} reads, is another one each time.
        typed = [setting.typed for setting in self._settings if not setting.typed.startswith("--start-time=")]
        search = {"settings": sorted(typed), "seed": self._options.seed, "pruner": self._options.pruner.value}
        before = self._study.user_attrs.get("search")
        if before is None:
            self._study.set_user_attr("search", search)
        elif before != search:
            raise ConfigError(
                f"sweep.dir={sweep_dir} holds a search with {' '.join(before['settings'])} sweep.seed={before['seed']} "
                f"sweep.pruner={before['pruner']}; repeat these to continue it, or choose another sweep.dir"
            )


def space_corners(settings: list[SweptSetting]) -> list[SweepRun]:
    """Return runs in which each value, and both ends of each interval, occur; for the checks before the start."""
    choices = [
        list(setting.values) if setting.interval is None else [_ends(setting)[0], _ends(setting)[1]]
        for setting in settings
    ]
    swept = [setting.key for setting in settings if setting.is_swept]
    return [
        name_run([options[min(index, len(options) - 1)] for options in choices], swept)
        for index in range(max(len(options) for options in choices))
    ]


def require_optuna() -> None:
    """Raise ConfigError if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "sweep.sampler=optuna needs the package optuna: pip install 'megavit[sweep]'; without it "
            "sweep.sampler=grid trains every combination"
        ) from error


def _open_study(journal: Path, options: SweepOptions) -> "Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    logging.getLogger("optuna").setLevel(logging.ERROR)
    # A killed process leaves its lock and, perhaps, half a line; the sweep's own lock keeps other processes out.
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        kept = journal.read_bytes()
        os.truncate(journal, kept.rfind(b"\n") + 1)
    pruner = optuna.pruners.MedianPruner() if options.pruner is Pruner.median else optuna.pruners.NopPruner()
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="sweep",
        # A metric whose smaller values are better is negated.
        direction="maximize",
        pruner=pruner,
        load_if_exists=True,
    )


def _draw_value(trial: "Trial", setting: SweptSetting) -> str:
    if not setting.is_swept:
        return setting.typed
    if setting.interval is None:
        if setting.is_range:
            return setting.values[trial.suggest_int(setting.key, 0, len(setting.values) - 1)]
        return str(trial.suggest_categorical(setting.key, setting.values))
    return _argument(setting, _draw_number(trial, setting.key, setting.interval))


def _draw_number(trial: "Trial", key: str, interval: Interval) -> float:
    if interval.is_integer:
        return trial.suggest_int(key, int(interval.low), int(interval.high), log=interval.is_log)
    drawn = trial.suggest_float(key, interval.low, interval.high, log=interval.is_log)
    return min(interval.high, max(interval.low, float(f"{drawn:.{_DIGITS}g}")))


def _ends(setting: SweptSetting) -> tuple[str, str]:
    assert setting.interval is not None
    return _argument(setting, setting.interval.low), _argument(setting, setting.interval.high)


def _argument(setting: SweptSetting, number: float) -> str:
    return f"{setting.typed.partition('=')[0]}={number!r}"
