"""Run checks in a subprocess, so that a package that crashes or hangs during its import does not end the doctor.

`python -m megavit.cli.doctor.isolated CHECK…` writes a line of JSON to standard output after each check.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO

from megavit.cli.doctor.devices import check_cpu, check_gpus
from megavit.cli.doctor.finding import Finding, State, in_a_line
from megavit.cli.doctor.kernels import check_kernels
from megavit.cli.doctor.packages import (
    check_apex,
    check_flash_attn,
    check_torch,
    check_training,
    check_transformer_engine,
)

# Checks by name: section, function, and the state of a failure, which for an optional package is only `missing`.
CHECKS: dict[str, tuple[str, Callable[[], list[Finding]], State]] = {
    "torch": ("imports", check_torch, State.broken),
    "megavit.train.trainer": ("imports", check_training, State.broken),
    "flash-attn": ("imports", check_flash_attn, State.missing),
    "transformer-engine": ("imports", check_transformer_engine, State.missing),
    "apex": ("imports", check_apex, State.missing),
    "training on": ("devices", check_gpus, State.broken),
    "processor": ("devices", check_cpu, State.missing),
    "attention": ("kernels", check_kernels, State.broken),
}

# The first import of torch from a network file system takes a minute.
_PATIENCE_S = 180.0


def run_check(name: str) -> list[Finding]:
    """Run one check in this process; an exception becomes a finding."""
    section, check, otherwise = CHECKS[name]
    try:
        return check()
    except Exception as error:
        return [Finding(section, name, otherwise, in_a_line(error))]


def run_in_subprocess(names: list[str], *, patience_s: float = _PATIENCE_S) -> Iterator[Finding]:
    """Run checks in a subprocess; start a new one for the remaining checks if a check ends it.

    Args:
        names: names of `CHECKS`.
        patience_s: most seconds of a check.
    """
    left = list(names)
    while left:
        with tempfile.TemporaryFile("w+") as errors:
            done = 0
            for findings in _answers(left, errors, patience_s):
                done += 1
                yield from findings
        left = left[done:]


def _answers(names: list[str], errors: IO[str], patience_s: float) -> Iterator[list[Finding]]:
    """Yield each check's findings, until a check ends the process."""
    command = [sys.executable, "-m", "megavit.cli.doctor.isolated", *names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        for name in names:
            timer = threading.Timer(patience_s, process.kill)
            timer.start()
            line = process.stdout.readline()
            # After the join, this timer cannot kill the process during another check.
            late = not timer.is_alive()
            timer.cancel()
            timer.join()
            if line:
                yield [Finding.from_json(found) for found in json.loads(line)]
                continue
            code = process.wait()
            errors.seek(0)
            yield [_ended(name, code, errors.read(), late=late, patience_s=patience_s)]
            return
    finally:
        process.kill()
        process.wait()


def _ended(name: str, code: int, errors: str, *, late: bool, patience_s: float) -> Finding:
    section, _, state = CHECKS[name]
    if late:
        message = f"no answer in {patience_s:g} s: its process was killed"
    else:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        last = (errors.strip().splitlines() or [""])[-1]
        message = f"its process ended {how}{': ' + last if last else ''}"
    return Finding(section, name, state, message)


def main(names: list[str]) -> None:
    """Run checks in this process and write their findings, one line per check."""
    # Send the output of imported packages to standard error, so that standard output holds only findings.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for name in names:
        answers.write(json.dumps([finding.to_json() for finding in run_check(name)]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
