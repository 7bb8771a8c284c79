"""Expand a sweep: settings with several values become runs, each named by the values in which it differs."""

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megavit.config.compose import AUTO_MODEL, compose
from megavit.config.overrides import key_of, read_setting, split_text_values, write_text
from megavit.config.settings import run_types
from megavit.errors import ConfigError

# Arguments that say where Hydra finds files, and when a run starts: they pass through as typed.
_NEVER_SWEPT = ("--", "hydra.searchpath=")
_MOST_RUNS = 10_000
# File systems take names of 255 bytes; a temporary name beside it is longer.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Interval:
    """A range of numbers that a sampler draws from.

    Attributes:
        low: smallest value.
        high: largest value.
        is_integer: whether only integers are drawn.
        is_log: whether the logarithm is drawn uniformly.
    """

    low: float
    high: float
    is_integer: bool
    is_log: bool


@dataclass(frozen=True)
class SweptSetting:
    """A setting as typed, with its values.

    Attributes:
        typed: the argument as typed.
        values: `key=value` for each value; empty for an interval.
        interval: the interval, for a sampler.
        is_range: whether the values are numbers in order, of range().
    """

    typed: str
    values: tuple[str, ...]
    interval: Interval | None = None
    is_range: bool = False

    @property
    def key(self) -> str:
        """The dotted path, or the group."""
        return key_of(self.typed)

    @property
    def is_swept(self) -> bool:
        """Whether the setting has several values, or is written as a sweep of one."""
        return self.values != (self.typed,)


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        name: the values that differ: `lr_0.001-model_vit_s16`.
        varied: the value of each swept setting, as typed.
        overrides: all settings of the run, with one value each.
    """

    name: str
    varied: dict[str, str]
    overrides: list[str]


def read_sweep(overrides: list[str]) -> list[SweptSetting]:
    """Read settings with one or several values.

    Raises:
        ConfigError: if no setting has several values, a value is repeated, or a setting cannot be read.
    """
    settings = _last_ones([read_swept(text, run_types()) for text in overrides])
    if not any(setting.is_swept for setting in settings):
        raise ConfigError("--multirun needs a setting with several values, as optim.lr=1e-3,3e-3")
    return settings


def _last_ones(settings: list[SweptSetting]) -> list[SweptSetting]:
    """Return the settings without those that are given again later, where one of the two has several values."""
    places = {setting.key: place for place, setting in enumerate(settings)}
    swept = {setting.key for setting in settings if setting.is_swept}
    return [
        setting for place, setting in enumerate(settings) if setting.key not in swept or place == places[setting.key]
    ]


def read_swept(typed: str, types: Mapping[str, Any]) -> SweptSetting:
    """Read one setting: key=a,b, key=choice(a,b), key=range(1,4), key=interval(0,1) or a single value.

    Commas separate the values of a text setting; a value that contains a comma is quoted.

    Args:
        typed: the argument as typed.
        types: types of the settings by path.

    Raises:
        ConfigError: if it cannot be parsed, or a value is repeated.
    """
    if typed.startswith(_NEVER_SWEPT):
        return SweptSetting(typed, (typed,))
    setting = _read_text(typed, types) or _read_in_hydras_grammar(typed, types)
    if len(set(setting.values)) < len(setting.values):
        raise ConfigError(f"'{typed}' names a value twice; each combination is one run")
    return setting


def expand(settings: list[SweptSetting]) -> list[SweepRun]:
    """Return a run for each combination of values, in the order of the settings.

    Raises:
        ConfigError: for an interval, which has no list of values.
    """
    for setting in settings:
        if setting.interval is not None:
            raise ConfigError(
                f"'{setting.typed}' is an interval, which a sampler draws from: add sweep.sampler=optuna "
                f"sweep.trials=20, or list values"
            )
    count = math.prod(len(setting.values) for setting in settings)
    if count > _MOST_RUNS:
        factors = " × ".join(str(len(setting.values)) for setting in settings if setting.is_swept)
        raise ConfigError(f"{factors} combinations are more than the {_MOST_RUNS} runs of a sweep; give fewer values")
    swept = [setting.key for setting in settings if setting.is_swept]
    return [
        name_run(list(combination), swept) for combination in itertools.product(*(each.values for each in settings))
    ]


def name_run(overrides: list[str], swept: list[str]) -> SweepRun:
    """Return the run of one combination of values.

    Args:
        overrides: its settings.
        swept: keys of the settings that differ from run to run.
    """
    short = [key.rsplit(".", 1)[-1] for key in swept]
    words, varied = [], {}
    for text in overrides:
        key = key_of(text)
        if key in swept:
            value = text.partition("=")[2]
            last = key.rsplit(".", 1)[-1]
            varied[key] = value
            words.append(f"{last if short.count(last) == 1 else key}_{_safe(value)}")
    return SweepRun(_shorten("-".join(words)), varied, overrides)


def base_name(overrides: list[str]) -> str:
    """Return the name that a run has without a sweep."""
    return compose([text for text in overrides if text != AUTO_MODEL]).run.name


def split_sweep(overrides: list[str]) -> list[list[str]]:
    """Return a list of settings for each combination of values (key=a,b); each run gets a name of its own.

    Raises:
        ConfigError: if no setting has several values, a value is repeated, or the runs would share one folder.
    """
    runs = expand(read_sweep(overrides))
    swept = runs[0].varied
    fixed = [text for text in overrides if text.startswith("run.dir=") and "run.dir" not in swept]
    if fixed and "run.name" not in swept:
        raise ConfigError(f"{fixed[0]} would be the folder of every job; remove it, and they are runs/NAME-VALUES")
    if "run.name" in swept or "run.dir" in swept:
        return [run.overrides for run in runs]
    return [with_name(run) for run in runs]


def with_name(run: SweepRun) -> list[str]:
    """Return a run's settings with the name NAME-VALUES, NAME being the name without a sweep."""
    rest = [text for text in run.overrides if not text.startswith("run.name=")]
    return [*rest, write_text("run.name", f"{base_name(run.overrides)}-{run.name}")]


def _read_text(typed: str, types: Mapping[str, Any]) -> SweptSetting | None:
    """Read a text setting; None for any other."""
    values = split_text_values(typed, types)
    return None if values is None else SweptSetting(typed, tuple(values))


def _read_in_hydras_grammar(typed: str, types: Mapping[str, Any]) -> SweptSetting:
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    override = read_setting(typed, types).override
    if not override.is_sweep_override():
        return SweptSetting(typed, (typed,))
    sweep, key = override.value(), typed.partition("=")[0]
    if isinstance(sweep, Glob):
        raise ConfigError(f"'{typed}': glob() is not read here; list the choices, {key}=a,b")
    if isinstance(sweep, IntervalSweep):
        return SweptSetting(typed, (), _interval(typed, sweep))
    assert isinstance(sweep, ChoiceSweep | RangeSweep)
    is_shuffled, sweep.shuffle = sweep.shuffle, False
    if isinstance(sweep, RangeSweep) and sweep.step == 0:
        raise ConfigError(f"'{typed}' has a step of 0; give range(START,STOP,STEP) another")
    values = [f"{key}={each}" for each in itertools.islice(override.sweep_string_iterator(), _MOST_RUNS + 1)]
    if not values:
        raise ConfigError(f"'{typed}' has no value: its start is not before its end")
    if is_shuffled:
        # The same command shuffles into the same order, so that a sweep is continued in it.
        random.Random(typed).shuffle(values)
    return SweptSetting(typed, tuple(values), is_range=isinstance(sweep, RangeSweep) and not is_shuffled)


def _interval(typed: str, sweep: Any) -> Interval:
    low, high = sweep.start, sweep.end
    unknown = sorted(set(sweep.tags) - {"log"})
    if unknown:
        raise ConfigError(f"'{typed}': the tag {unknown[0]} has no meaning here; tag(log, interval(…)) is known")
    if not low < high:
        raise ConfigError(f"'{typed}': {low} is not below {high}")
    is_log = "log" in sweep.tags
    if is_log and low <= 0:
        raise ConfigError(f"'{typed}': a logarithmic interval begins above 0")
    return Interval(low, high, is_integer=isinstance(low, int) and isinstance(high, int), is_log=is_log)


def _safe(value: str) -> str:
    return re.sub(r"[^\w.+-]+", ".", value).strip(".")


def _shorten(name: str) -> str:
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def shared_names(names: list[str]) -> Iterator[str]:
    """Return the names that occur more than once."""
    return (name for name in dict.fromkeys(names) if names.count(name) > 1)
