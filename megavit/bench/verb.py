"""`megavit bench`: megavit's step beside its peers', on the same work."""

import difflib
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavit.bench.config import KEYS, BenchConfig
from megavit.bench.measure import Measured, RowMeasurement, to_come
from megavit.bench.rows import ON_CPU, ON_GPU, PRECISIONS, ROWS, TP2, overrides_of
from megavit.compose import compose
from megavit.errors import ConfigError
from megavit.metrics.starts import provenance
from megavit.overrides import read_text


def bench(arguments: list[str]) -> int:
    """Measure every row, print the table, leave figures and picture in `bench.dir`.

    Args:
        arguments: `bench.KEY=value`, and settings that are laid over those of each row.

    Raises:
        ConfigError: for a setting that is wrong.
    """
    from rich.console import Console

    from megavit.bench.report import append, draw, flops_per_image, lines_of, print_table
    from megavit.parallel.cpu import run_on_cpu

    start = time.monotonic()
    config, overrides = read_arguments(arguments)
    device = "cpu" if run_on_cpu() else "cuda"
    rows = config.rows or list(ON_CPU if device == "cpu" else ON_GPU)
    for label in rows:
        _check_row(label, overrides)
    known = list(dict.fromkeys(name for row in ROWS.values() for name in row.candidates))
    for name in config.candidates:
        if name not in known:
            raise ConfigError(f"bench.contestants: nobody is called {name}; known: {', '.join(known)}")
    folder = Path(config.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = folder / "bench.jsonl"
        append(lines, {"kind": "start", "rows": rows, "overrides": overrides, **provenance()})
    except OSError as error:
        raise ConfigError(f"bench.dir={config.dir} cannot be written: {error.strerror}; choose another") from error
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
    console.print(f"{lines} has every figure, {folder / 'bench.png'} the picture", highlight=False)
    return 0


def read_arguments(arguments: list[str]) -> tuple[BenchConfig, list[str]]:
    """The bench section, checked, and the other settings as typed.

    Raises:
        ConfigError: for a key or a value that is wrong.
    """
    options: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not key.startswith("bench.") or not sign:
            overrides.append(argument)
        elif key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            raise ConfigError(
                f"the setting {key} does not exist; " + (f"did you mean {near[0]}?" if near else f"known: {KEYS}")
            )
        else:
            name = key.removeprefix("bench.")
            options[name] = value.strip("[]").split(",") if name in ("rows", "contestants") else read_text(value)
    options = {name: None if value == "null" else value for name, value in options.items()}
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BenchConfig), options))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"bench.{error.full_key}={options[error.full_key or '']}: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(config, BenchConfig)
    config.check()
    return config, overrides


def _check_row(label: str, overrides: list[str]) -> None:
    name, _, precision = label.partition(":")
    if name not in ROWS or precision not in PRECISIONS:
        raise ConfigError(
            f"bench.rows: there is no row {label}; a row is NAME:PRECISION, of {', '.join(ROWS)} and of "
            f"{', '.join(PRECISIONS)}"
        )
    settings = [*overrides_of(ROWS[name], precision, 8), *overrides]
    compose(settings).check(1)
    if name == "tp2":
        compose([*settings, TP2]).check(2)
