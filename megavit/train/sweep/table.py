"""`sweep.csv`, a row for each run of a sweep, and `sweep.png`, its picture."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.train.sweep.results import Outcome, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RESULTS = ("status", "steps", "metric", "best", "last", "val_loss", "reason")
_COLOURS = ("#4477aa", "#cc6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
_PANELS = 4
_BARS = 40
_TICKS = 6


class SweepTable:
    """The rows of a sweep, written whenever one changes.

    Nothing in it depends on the time or the machine: a sweep that was interrupted ends with the same file.

    Args:
        path: of the file.
        keys: the swept settings.
    """

    def __init__(self, path: Path, keys: list[str]) -> None:
        self._path, self.keys = path, keys
        self.varied: dict[str, dict[str, str]] = {}
        self.outcomes: dict[str, Outcome] = {}

    def add(self, name: str, varied: dict[str, str], outcome: Outcome) -> None:
        """Add or change a run without writing the file."""
        self.varied[name], self.outcomes[name] = varied, outcome

    def set(self, name: str, outcome: Outcome) -> None:
        """Set what a run has reached, and write the file."""
        self.outcomes[name] = outcome
        self.write()

    def number(self, name: str) -> int:
        """Return a run's place in the table, from 1."""
        return list(self.outcomes).index(name) + 1

    def best(self) -> str | None:
        """Return the finished run with the best metric; None if no run has one."""
        finished = {
            name: outcome
            for name, outcome in self.outcomes.items()
            if outcome.status is Status.finished and outcome.best is not None
        }
        if len({(outcome.metric, outcome.higher) for outcome in finished.values()}) != 1:
            return None
        sign = 1 if next(iter(finished.values())).higher else -1
        return max(finished, key=lambda name: sign * (finished[name].best or 0.0))

    def write(self) -> None:
        """Write the file under a temporary name and rename it."""
        partial = self._path.with_suffix(".csv.tmp")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["run", *self.keys, *_RESULTS])
            for name, outcome in self.outcomes.items():
                settings = [self.varied[name].get(key, "") for key in self.keys]
                writer.writerow([name, *settings, *_cells(outcome)])
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path)


def _cells(outcome: Outcome) -> list[str]:
    shown = (outcome.steps, outcome.metric, outcome.best, outcome.last, outcome.val_loss, outcome.reason)
    return [outcome.status.value, *("" if value is None else str(value) for value in shown)]


def draw_sweep(table: SweepTable, picture: Path) -> None:
    """Draw the best value of the metric of each run into a PNG.

    Args:
        table: with at least one result.
        picture: the PNG to write.
    """
    from matplotlib.figure import Figure

    found = {name: outcome for name, outcome in table.outcomes.items() if outcome.best is not None}
    best = table.best()
    assert best is not None
    metric = found[best].metric
    values = {
        name: outcome.best for name, outcome in found.items() if outcome.metric == metric and outcome.best is not None
    }
    pruned = {name for name in values if found[name].status is Status.pruned}
    numeric = [key for key in table.keys if _are_numbers(table.varied[name][key] for name in values)][:_PANELS]
    if numeric:
        figure = Figure(figsize=(4.6 * len(numeric), 4.4), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(numeric), squeeze=False)[0], numeric, strict=True):
            _draw_panel(axes, table, values, key=key, best=best, pruned=pruned)
            axes.set(xlabel=key, ylabel=f"best {metric}")
    else:
        shown = dict(sorted(values.items(), key=lambda item: item[1], reverse=found[best].higher)[:_BARS])
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(shown)), layout="constrained")
        _draw_bars(figure.subplots(), shown, best=best, metric=metric)
    partial = picture.with_suffix(".tmp.png")
    figure.savefig(partial, dpi=110)
    partial.replace(picture)


def _are_numbers(texts: Iterable[str]) -> bool:
    try:
        return len({float(text) for text in texts}) > 1
    except ValueError:
        return False


def _draw_panel(
    axes: "Axes", table: SweepTable, values: dict[str, float], *, key: str, best: str, pruned: set[str]
) -> None:
    """Draw the runs over one setting; finished ones that agree in all other settings are one line."""
    x = {name: float(table.varied[name][key]) for name in values}
    lines: dict[str, list[str]] = {}
    for name in sorted(values.keys() - pruned, key=lambda name: x[name]):
        others = ", ".join(f"{_short(other)}={text}" for other, text in table.varied[name].items() if other != key)
        lines.setdefault(others, []).append(name)
    as_lines = len(lines) <= len(_COLOURS) and any(len(names) > 1 for names in lines.values())
    for index, (others, names) in enumerate(sorted(lines.items())):
        style, colour = ("o-", _COLOURS[index]) if as_lines else ("o", _COLOURS[0])
        label = others if as_lines and others else None
        points = [x[name] for name in names], [values[name] for name in names]
        axes.plot(*points, style, color=colour, markersize=5, label=label)
    if pruned:
        points = [x[name] for name in pruned], [values[name] for name in pruned]
        axes.plot(*points, "o", color="#bbbbbb", markersize=5, label="pruned")
    axes.plot([x[best]], [values[best]], "*", color="#222222", markersize=13, label="best")
    _scale(axes, sorted(set(x.values())))
    axes.grid(alpha=0.3)
    # Below the axes, where it hides no point.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, ncols=2)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _scale(axes: "Axes", places: list[float]) -> None:
    """Scale the axis logarithmically where the values span most of a decade; label few values as they are."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if places[0] > 0 and places[-1] >= 8 * places[0]:
        axes.set_xscale("log")
    if len(places) <= _TICKS:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _draw_bars(axes: "Axes", values: dict[str, float], *, best: str, metric: str) -> None:
    names = list(values)
    bars = axes.barh(names, list(values.values()), color=[_COLOURS[1 if name == best else 0] for name in names])
    axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
    low, high = min(0.0, *values.values()), max(0.0, *values.values())
    margin = 0.12 * (high - low)
    axes.set_xlim(low - margin if low < 0 else 0.0, high + margin)
    axes.invert_yaxis()
    axes.set(xlabel=f"best {metric}")
    axes.grid(alpha=0.3, axis="x")
