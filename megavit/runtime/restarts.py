"""Whether a run is to be started again, told to a cluster that reads nothing but exit codes.

Such a cluster sets MEGAVIT_MAX_RESTARTS. Kubeflow's operator, and the rules of a Kubernetes Job, start a container
again that leaves with 128 and more, and give one up that leaves with less.
"""

import os
import sys
from pathlib import Path

from megavit.runtime.exits import FAULT, FINISHED, STOPPED, USER_ERROR

VARIABLE = "MEGAVIT_MAX_RESTARTS"
_AGAIN = 128


def cluster_exit_code(code: int, run_dir: Path | None, *, node: str) -> int:
    """The code that a node leaves with: 128 more than its own where the run should be started again.

    A run that was stopped, and has saved, always should; a crashed one at most MEGAVIT_MAX_RESTARTS times in a row,
    counted in the run's folder since its last new checkpoint. Without that variable the code stays as it is.

    Args:
        code: the run's (see `megavit.runtime.exits`).
        run_dir: the run's folder; None where its settings are wrong.
        node: this machine's number within the job; each counts for itself.
    """
    limit = os.environ.get(VARIABLE)
    if limit is None or run_dir is None:
        return code
    count = run_dir / "launch" / f"crashes-{node}"
    try:
        if code in (FINISHED, USER_ERROR, STOPPED):
            count.unlink(missing_ok=True)
            return code + _AGAIN if code == STOPPED else code
        crashes = _crashes(count, run_dir) + 1
        if crashes <= int(limit):
            _say(f"crashed, {crashes} in a row: to be started again")
            return FAULT + _AGAIN
        # Whoever submits the job again has changed something.
        count.unlink()
        _say(f"crashed {crashes} times in a row (cluster.max_restarts={limit}), not to be started again")
    except OSError as error:
        _say(f"{count} cannot be written ({error.strerror}), and without a count nothing is started again")
    return FAULT


def _crashes(count: Path, run_dir: Path) -> int:
    """Crashes in a row before this one, which is counted for the next."""
    latest = _read(run_dir / "checkpoints" / "latest") or "none"
    before, _, seen = _read(count).partition(" ")
    crashes = int(before) if before.isdigit() and seen == latest else 0
    count.parent.mkdir(parents=True, exist_ok=True)
    count.write_text(f"{crashes + 1} {latest}\n")
    return crashes


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _say(message: str) -> None:
    print(f"megavit: {message}", file=sys.stderr, flush=True)
