"""Read a run's `metrics.jsonl`."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_rows(metrics_file: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, without those that a full disk or a killed run left incomplete."""
    rows = []
    for line in metrics_file.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def without_repeated(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Return the lines of a split; of steps that a resumed run has trained again, the later lines."""
    points: list[dict[str, Any]] = []
    for row in rows:
        if row["split"] != split:
            continue
        while points and points[-1]["step"] >= row["step"]:
            points.pop()
        points.append(row)
    return points
