"""Write the benchmark's figures as JSON lines, as a table and as a plot."""

import json
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.step.cases import ROWS, overrides_of
from benchmarks.step.measure import Figures, Measured, is_own
from megavit.config.compose import compose
from megavit.metrics.throughput import peak_of
from megavit.planner.flops import training_flops

# Above this drift of its matmul rate, the device was not stable between turns.
_DRIFT = 0.1
_KINDS_SHOWN = 6


def lines_of(row: Measured, flops: int) -> list[dict[str, Any]]:
    """Return a JSON line for each candidate: medians with their spread, rates, memory, or why it was not timed."""
    lines = []
    for name, figures in row.candidates.items():
        line: dict[str, Any] = {
            "kind": "candidate",
            "row": f"{row.name}:{row.precision}",
            "candidate": name,
            "batch": row.batch,
            **row.about,
        }
        if figures.without is not None:
            lines.append({**line, "without": figures.without})
            continue
        seconds = statistics.median(figures.seconds)
        rate = row.batch * flops / seconds
        line |= {
            "rounds": len(figures.seconds),
            "steps": figures.steps,
            "median_s": seconds,
            "min_s": min(figures.seconds),
            "max_s": max(figures.seconds),
            "images_per_s": row.batch / seconds,
            "model_flops": rate,
            "mfu_matmul": rate / row.rate("matmul_flops"),
            "matmul_flops": row.rate("matmul_flops"),
            "copy_bytes": row.rate("copy_bytes"),
            "drift": row.drift,
            **figures.memory,
            "kinds_s": figures.kinds,
            **({"differs": vars(figures.differs)} if figures.differs is not None else {}),
        }
        peak = peak_of(row.about["device"])
        if peak is not None:
            line["mfu"] = rate / peak
        for other in row.timed:
            if other != name:
                line[f"over {other}"] = _spread(row.ratios(name, other))
        lines.append(line)
    return lines


def flops_per_image(row: Measured, overrides: list[str]) -> int:
    """Return the model FLOPs of a training step for one image of a row, with the overrides."""
    config = compose([*overrides_of(ROWS[row.name], row.precision, row.batch), *overrides])
    return training_flops(config.network_shape(num_classes=config.data.num_classes or 0))


def print_table(rows: list[Measured], flops: dict[int, int], console: Console) -> None:
    """Print each candidate's step time, speed, utilisation, memory, and megavit's step time divided by its own."""
    for row in rows:
        fastest = row.leader
        table = Table(
            title=f"{row.name} {row.precision}, {row.batch} images a step", title_justify="left", box=box.SIMPLE
        )
        table.add_column("", no_wrap=True)
        for column in ("step", "images/s", "mfu_matmul", "GiB", f"{fastest}\n÷ it"):
            table.add_column(column, justify="right")
        for name, figures in row.candidates.items():
            if figures.without is None:
                table.add_row(name, *_cells(row, figures, flops[id(row)]), _ratio(row, fastest, name))
        console.print(table)
        for name, figures in row.candidates.items():
            if figures.without is not None:
                console.print(f"{name} not timed: {figures.without}", highlight=False)
        if row.rates:
            console.print(
                f"{row.about.get('device')}, {row.about.get('threads')} threads: matmul "
                f"{row.rate('matmul_flops') / 1e12:.3g} TFLOP/s, copy {row.rate('copy_bytes') / 1e9:.3g} GB/s; the "
                f"matmul rate drifted by {row.drift:.0%} meanwhile"
                + (" (at this drift the ratios are inaccurate)" if row.drift > _DRIFT else ""),
                highlight=False,
            )
        for name in row.leaders:
            if row.candidates[name].kinds:
                console.print(f"{name}: {_kinds(row.candidates[name].kinds)}", highlight=False)
        console.print()


def _kinds(kinds: dict[str, float]) -> str:
    total = sum(kinds.values())
    parts = [f"{kind} {seconds / total:.0%}" for kind, seconds in list(kinds.items())[:_KINDS_SHOWN]]
    return f"{total:.3g} s in kernels: {', '.join(parts)}"


def _cells(row: Measured, figures: Figures, flops: int) -> list[str]:
    seconds = statistics.median(figures.seconds)
    return [
        _time(seconds),
        f"{row.batch / seconds:,.3g}" if row.batch / seconds < 100 else f"{row.batch / seconds:,.0f}",
        f"{row.batch * flops / seconds / row.rate('matmul_flops'):.0%}",
        " + ".join(f"{value / 2**30:.2f}" for value in figures.memory.values()),
    ]


def _ratio(row: Measured, mine: str, other: str) -> str:
    if mine == other:
        return "1"
    low, middle, high = _spread(row.ratios(mine, other)).values()
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def append(file: Path, line: dict[str, Any]) -> None:
    """Append a JSON line to a file and close it."""
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def draw(rows: list[Measured], picture: Path) -> None:
    """Plot each candidate's step time over the reference's: median and extremes of all rounds, a panel per row."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.timed]
    if not rows:
        return
    figure = Figure(figsize=(9, 0.6 + sum(0.55 + 0.28 * len(row.timed) for row in rows)), layout="constrained")
    heights = [1 + len(row.timed) for row in rows]
    image_grid = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, row in zip(image_grid, rows, strict=True):
        names = list(row.timed)[::-1]
        spreads = [_spread(row.ratios(name, row.reference)) for name in names]
        middles = [spread["median"] for spread in spreads]
        whiskers = [
            [spread["median"] - spread["min"] for spread in spreads],
            [spread["max"] - spread["median"] for spread in spreads],
        ]
        colours = ["#4477aa" if is_own(name) else "#bbbbbb" for name in names]
        axes.barh(names, middles, xerr=whiskers, color=colours, ecolor="#333333", capsize=2)
        axes.axvline(1, color="#333333", linewidth=0.8)
        axes.set_title(f"{row.name} {row.precision}: time of a step over {row.reference}'s", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    figure.savefig(picture, dpi=120)
