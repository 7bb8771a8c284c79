"""Plan the runs of a sweep: each is composed and checked before the first one starts."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megavit.config.compose import AUTO_MODEL, compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import read_text, write_text
from megavit.config.saved import from_yaml
from megavit.config.sweep import SweepRun, shared_names, with_name
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.train.resume_rules import Rule, changes
from megavit.train.sweep.machine import Slot
from megavit.train.sweep.results import Status, read_outcome


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep, checked.

    Attributes:
        name: its folder below the sweep's.
        varied: the value of each swept setting, as typed.
        overrides: its settings, for `megavit train`.
        config: the configuration composed of them.
        ranks: its processes.
    """

    name: str
    varied: dict[str, str]
    overrides: list[str]
    config: ExperimentConfig
    ranks: int

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def is_finished(self) -> bool:
        """Whether the run has finished, at the length that it has now."""
        if read_outcome(self.dir).status is not Status.finished:
            return False
        saved = from_yaml((self.dir / "config.yaml").read_text())
        return (saved.train.steps, saved.train.epochs) == (self.config.train.steps, self.config.train.epochs)


def plan_runs(runs: list[SweepRun], sweep_dir: Path, *, slot: Slot) -> list[PlannedRun]:
    """Compose and check every run.

    Args:
        runs: the combinations.
        sweep_dir: the sweep's folder.
        slot: what one run gets of this machine.

    Raises:
        ConfigError: if a run is wrong, or two of them have one folder.
    """
    folders = [folder_name(run) for run in runs]
    for name in shared_names(folders):
        raise ConfigError(
            f"{folders.count(name)} runs of the sweep would share the folder {sweep_dir / name}; each combination "
            f"needs a folder of its own"
        )
    _refuse_another_sweep(sweep_dir, runs[0].varied)
    planned = []
    for run in runs:
        try:
            planned.append(plan_run(run, sweep_dir, slot=slot))
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from error
    return planned


def plan_run(run: SweepRun, sweep_dir: Path, *, slot: Slot) -> PlannedRun:
    """Compose and check one run.

    Raises:
        ConfigError: if it is wrong, or its folder holds a run with other settings.
    """
    name = folder_name(run)
    named = run.overrides if "run.name" in run.varied else with_name(run)
    overrides = [*named, write_text("run.dir", str(sweep_dir / name))]
    config = compose(_resolved(overrides))
    ranks = slot.num_ranks(config)
    validate(config, ranks)
    _refuse_other_settings(Path(config.run.dir), config)
    return PlannedRun(name, run.varied, overrides, config, ranks)


def folder_name(run: SweepRun) -> str:
    """Return a run's folder below the sweep's: the values that differ, or the names where those are swept."""
    return read_text(run.varied["run.name"]) if "run.name" in run.varied else run.name


def refuse_own_folders(overrides: Iterable[str]) -> None:
    """Refuse settings that would move a run out of the sweep's folder.

    Raises:
        ConfigError: naming the setting.
    """
    for text in overrides:
        if text.startswith("run.dir="):
            raise ConfigError(
                f"{text}: the runs of a sweep have folders below sweep.dir, named by what differs; set sweep.dir"
            )


def _refuse_another_sweep(sweep_dir: Path, varied: dict[str, str]) -> None:
    table = sweep_dir / "sweep.csv"
    if not table.exists():
        return
    with table.open(newline="") as file:
        header = next(csv.reader(file), [])
    before = header[1 : header.index("status")] if "status" in header else []
    if set(before) != set(varied):
        raise ConfigError(
            f"sweep.dir={sweep_dir} holds a sweep over {', '.join(before)}, and this one is over {', '.join(varied)}; "
            f"choose another sweep.dir"
        )


def _refuse_other_settings(run_dir: Path, config: ExperimentConfig) -> None:
    saved_file = run_dir / "config.yaml"
    if not saved_file.exists():
        return
    saved = from_yaml(saved_file.read_text())
    differ = changes(saved, config, Rule.reported, Rule.run, Rule.network)
    if differ:
        listed = "; ".join(f"{setting} {before} there, {now} here" for setting, (before, now) in differ.items())
        raise ConfigError(f"{run_dir} holds a run with other settings: {listed}; choose another sweep.dir")


def _resolved(overrides: list[str]) -> list[str]:
    if AUTO_MODEL not in overrides:
        return overrides
    from megavit.train.auto_model import resolve_auto

    return resolve_auto(overrides)[0]
