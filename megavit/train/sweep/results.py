"""How a run of a sweep ended, read from its folder."""

import json
import signal
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megavit.metrics.rows import read_rows, without_repeated
from megavit.runtime.run_dir import FINISHED, STOPPED


class Status(Enum):
    """The state of a run. A pruned one was stopped because its metric was worse than that of the others."""

    pending = "pending"
    running = "running"
    finished = "finished"
    stopped = "stopped"
    pruned = "pruned"
    failed = "failed"


@dataclass(frozen=True)
class Outcome:
    """What a run has reached.

    Attributes:
        status: its state.
        steps: optimizer steps done.
        metric: name of the metric that selects the best checkpoint; of the averaged weights, if the run has them.
        higher: whether a larger value is better.
        best: best value of the metric.
        last: value at the last evaluation.
        val_loss: validation loss at the last evaluation.
        reason: why it failed.
    """

    status: Status
    steps: int = 0
    metric: str = ""
    higher: bool = True
    best: float | None = None
    last: float | None = None
    val_loss: float | None = None
    reason: str = ""


def read_outcome(run_dir: Path, *, returncode: int | None = None, until_step: int | None = None) -> Outcome:
    """Read what a run has reached.

    Args:
        run_dir: its folder.
        returncode: of its process, if it has just ended; it counts where `exit.json` holds no code.
        until_step: ignore evaluations after this step.
    """
    status, reason = _status(run_dir, returncode)
    rows = [row for row in lines_of(run_dir / "metrics.jsonl") if until_step is None or row["step"] <= until_step]
    evaluations = without_repeated(rows, "val")
    name, higher = monitored(run_dir, evaluations)
    values = [row[name] for row in evaluations if row.get(name) is not None]
    best = (max(values) if higher else min(values)) if values else None
    return Outcome(
        status,
        steps=max((row["step"] for row in (*without_repeated(rows, "train")[-1:], *evaluations[-1:])), default=0),
        metric=name if values else "",
        higher=higher,
        best=best,
        last=values[-1] if values else None,
        val_loss=evaluations[-1].get("loss") if evaluations else None,
        reason=reason,
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's file; none where the run has not written it yet."""
    return read_rows(file) if file.exists() else []


def monitored(run_dir: Path, evaluations: list[dict[str, Any]]) -> tuple[str, bool]:
    """Return the metric that selects a run's best checkpoint, and whether a larger value is better.

    Args:
        run_dir: the run's folder.
        evaluations: its validation lines, which say whether the metric of averaged weights is there.
    """
    name, higher = "loss", False
    for start in lines_of(run_dir / "starts.jsonl"):
        if "monitor" in start:
            name, higher = start["monitor"]["metric"], start["monitor"]["higher"]
    averaged = f"ema_{name}"
    return (averaged if any(averaged in row for row in evaluations) else name), higher


def last_step(run_dir: Path) -> int:
    """Return the last step that a run has logged, 0 before the first."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def _status(run_dir: Path, returncode: int | None) -> tuple[Status, str]:
    kept = _read_exit(run_dir)
    if kept is not None and kept["code"] is not None:
        # A signal may have ended the process after its last line.
        returncode = kept["code"]
    elif returncode is None:
        # A run that was killed leaves null, and is continued.
        return (Status.pending if kept is None else Status.stopped), ""
    if returncode == FINISHED:
        return Status.finished, ""
    if returncode == STOPPED:
        return Status.stopped, ""
    if kept is not None and kept["error"]:
        return Status.failed, _last_line(kept["error"])
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (often the machine ran out of memory)" if name == "SIGKILL" else ""
        return Status.failed, f"ended by {name}{hint}"
    console = run_dir / CONSOLE
    said = _last_line(console.read_text(errors="replace")) if console.exists() else ""
    return Status.failed, said or f"exit code {returncode}"


# What a run prints.
CONSOLE = "console.log"


def _read_exit(run_dir: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads((run_dir / "exit.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return kept if isinstance(kept, dict) and {"code", "error"} <= kept.keys() else None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("megavit: ") if lines else ""
