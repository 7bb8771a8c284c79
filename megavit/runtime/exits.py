"""Exit codes, and `RUN/exit.json`, which keeps the code of a run.

0 finished; 1 a fault; 2 wrong settings or data; 3 findings, of commands that look for something; 75 stopped and saved.
"""

import json
from pathlib import Path

FINISHED, FAULT, USER_ERROR, FINDINGS, STOPPED = 0, 1, 2, 3, 75


def write_exit(run_dir: Path | None, code: int | None, error: str | None) -> None:
    """Leave the exit code in `RUN/exit.json`, where an outer launcher's own code would hide it; null while it runs."""
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "exit.json").write_text(json.dumps({"code": code, "error": error}) + "\n")
