"""Start the ranks whose network `megavit doctor` looks at, and take what they found, in a bounded time."""

import contextlib
import io
import json
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from megavit.cli.doctor.finding import Finding, State

# What each rank runs, and the name of its variable; to import that would import torch.
_RANK = "megavit.cli.doctor.rank"
_FINDINGS = "MEGAVIT_DOCTOR_FINDINGS"
_ON_CPU = 2
# For the ranks' own imports, and for leaving.
_BESIDES_S = 90.0
_LEAVING_S = 3.0
_LOOK_EVERY_S = 0.2


def check_network(asked_ranks: int | None, before: list[Finding], *, timeout_s: float) -> list[Finding]:
    """The all-reduce across the ranks of this machine.

    Args:
        asked_ranks: to start; None for one per GPU, or on the CPU two.
        before: what was found until now; of torch and of the device.
        timeout_s: seconds that ranks may wait for each other.
    """
    bad = [finding.name for finding in before if finding.name == "torch" and finding.state is not State.ok]
    devices = [finding.figures for finding in before if "device" in finding.figures and "count" in finding.figures]
    if bad or not devices:
        why = "torch cannot be used" if bad else "the device of training is not known"
        return [Finding("network", "all-reduce", State.broken, f"not run: {why}")]
    count = devices[0]["count"]
    ranks = asked_ranks or count or _ON_CPU
    if asked_ranks is not None:
        message = "as run.ranks says"
    elif count:
        message = "one per GPU, as megavit train would start"
    else:
        message = "for something to be sent; megavit train starts as many on a CPU as the layout needs"
    return [Finding("network", "ranks", State.ok, f"{ranks}, {message}"), *_across(ranks, timeout_s)]


def _across(ranks: int, timeout_s: float) -> list[Finding]:
    from megavit.runtime.workers import start_ranks

    done = threading.Event()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as launcher:
        file = Path(folder) / "findings.json"
        os.environ[_FINDINGS] = str(file)
        until_s = timeout_s + _BESIDES_S
        threading.Thread(target=_kill_stragglers, args=(file, until_s, done), daemon=True).start()
        code = start_ranks([f"run.timeout_s={timeout_s:g}"], ranks=ranks, module=_RANK)
        done.set()
        found = json.loads(file.read_text()) if file.exists() else []
    findings = [Finding.from_json(finding) for finding in found]
    said = launcher.getvalue().strip().removeprefix("megavit: ")
    if findings:
        # Of a rank that was ended only the launcher knows; of one that hung it knows no more than that it ended it.
        return [
            replace(finding, text=f"{said}; {finding.text}")
            if said and finding.figures.get("asked_to_leave_by")
            else finding
            for finding in findings
        ]
    message = f"the ranks left with code {code} and without an answer within {until_s:g} s{': ' + said if said else ''}"
    return [Finding("network", "all-reduce", State.broken, message)]


def _kill_stragglers(file: Path, until_s: float, done: threading.Event) -> None:
    """End the ranks that are still there when one has told its findings, or when nobody has in so many seconds."""
    import psutil

    from megavit.runtime.workers import running

    deadline = time.monotonic() + until_s
    while not file.exists() and time.monotonic() < deadline and not done.wait(_LOOK_EVERY_S):
        pass
    if not done.wait(_LEAVING_S):
        for child in running(_RANK):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
