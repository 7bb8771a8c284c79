"""Time the training steps of megavit, timm, Hugging Face and plain torch on the same work.

python -m benchmarks.step [rows=vit_b16:fp32,… candidates=… rounds=5 block_s=0.5 deadline_s=840 batch=N dir=FOLDER]
[key=value …]
"""

import sys
import time
from pathlib import Path

from benchmarks.step.cases import ON_CPU, ON_GPU, PRECISIONS, ROWS, TP2, overrides_of
from benchmarks.step.config import BenchConfig
from benchmarks.step.measure import Measured, RowMeasurement, to_come
from megavit.cli.arguments import describe, parse
from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.metrics.provenance import provenance
from megavit.runtime.run_dir import FINISHED, USER_ERROR

_PROGRAM = "python -m benchmarks.step"


def bench(arguments: list[str]) -> int:
    """Measure every row, print the table, and write figures and plot to `dir`.

    Args:
        arguments: `KEY=value` of `BenchConfig`, and settings that override those of each row.

    Raises:
        ConfigError: if a setting is wrong.
    """
    from rich.console import Console

    from benchmarks.step.report import append, draw, flops_per_image, lines_of, print_table
    from megavit.parallel.cpu_backend import run_on_cpu

    start = time.monotonic()
    config, overrides = parse(_PROGRAM, BenchConfig, arguments, settings=True)
    device = "cpu" if run_on_cpu() else "cuda"
    rows = list(config.rows) or list(ON_CPU if device == "cpu" else ON_GPU)
    for label in rows:
        _check_row(label, overrides)
    known = list(dict.fromkeys(name for row in ROWS.values() for name in row.candidates))
    for name in config.candidates:
        if name not in known:
            raise ConfigError(f"candidates: there is no {name}; known: {', '.join(known)}")
    folder = Path(config.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = folder / "bench.jsonl"
        append(lines, {"kind": "start", "rows": rows, "overrides": overrides, **provenance()})
    except OSError as error:
        raise ConfigError(f"dir={config.dir} cannot be written: {error.strerror}; choose another") from error
    console = Console()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:5.0f} s  {text}[/dim]", highlight=False, soft_wrap=True)

    measured: list[Measured] = []
    flops: dict[int, int] = {}
    until = start + config.deadline_s
    for place, label in enumerate(rows):
        row = RowMeasurement(
            label,
            config,
            overrides,
            device=device,
            until=until,
            to_come=to_come(rows, place, config, device=device),
            say=say,
            keep=lambda line: append(lines, line),
        ).run()
        measured.append(row)
        flops[id(row)] = flops_per_image(row, overrides)
        for line in lines_of(row, flops[id(row)]):
            append(lines, line)
    print_table(measured, flops, console)
    draw(measured, folder / "bench.png")
    console.print(f"all figures are in {lines}, the plot is {folder / 'bench.png'}", highlight=False)
    return 0


def _check_row(label: str, overrides: list[str]) -> None:
    name, _, precision = label.partition(":")
    if name not in ROWS or precision not in PRECISIONS:
        raise ConfigError(
            f"rows: there is no row {label}; a row is NAME:PRECISION, of {', '.join(ROWS)} and of "
            f"{', '.join(PRECISIONS)}"
        )
    settings = [*overrides_of(ROWS[name], precision, 8), *overrides]
    validate(compose(settings), 1)
    if name == "tp2":
        validate(compose([*settings, TP2]), 2)


def main() -> int:
    """Run the benchmark; the exit code is 2 for a wrong argument."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        about = "time a training step of megavit, timm, Hugging Face and plain torch on the same work"
        print(describe(_PROGRAM, BenchConfig, about=about, settings=True))
        return FINISHED
    try:
        return bench(sys.argv[1:])
    except ConfigError as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
