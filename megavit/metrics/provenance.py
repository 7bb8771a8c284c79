"""Record each start of a run in `RUN/starts.jsonl`: command, versions, machine and commit."""

import json
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("megavit", "torch", "megatron-core", "torchvision", "numpy", "flash-attn", "transformer-engine", "apex")


def record_launch(run_dir: Path, *, layout: str, step: int, monitor: dict[str, Any]) -> None:
    """Add a line about this start; one rank calls this.

    Args:
        run_dir: the run's folder.
        layout: description of the layout.
        step: steps done before this start.
        monitor: the metric that selects the best checkpoint, and whether a larger value is better.
    """
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "layout": layout,
        "monitor": monitor,
        "command": sys.argv,
        **provenance(),
    }
    with (run_dir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def provenance() -> dict[str, Any]:
    """Return machine, versions and commit, for figures and starts."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Return the commit of megavit's source, with a plus if the source has changed; None if megavit is installed."""
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
