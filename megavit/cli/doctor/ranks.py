"""Start ranks that check the network for `megavit doctor`, and collect their findings within a time limit."""

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

# The module that each rank runs, and the variable that it reads. Importing that module would import torch.
_RANK = "megavit.cli.doctor.rank"
_FINDINGS = "MEGAVIT_DOCTOR_FINDINGS"
_ON_CPU = 2
# Seconds for the ranks' imports, and for their exit.
_BESIDES_S = 90.0
_LEAVING_S = 3.0
_LOOK_EVERY_S = 0.2


def check_network(asked_ranks: int | None, before: list[Finding], *, timeout_s: float) -> list[Finding]:
    """Check an all-reduce across ranks on this machine.

    Args:
        asked_ranks: number of ranks to start; None for one per GPU, or two on the CPU.
        before: earlier findings, among them those on torch and the device.
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
        message = "set by run.ranks"
    elif count:
        message = "one per GPU, as in megavit train"
    else:
        message = "the fewest that send data; on a CPU megavit train starts as many as the layout needs"
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
        # Only the launcher knows that a rank was killed; for a rank that hung it adds only that it killed it.
        return [
            replace(finding, text=f"{said}; {finding.text}")
            if said and finding.figures.get("asked_to_leave_by")
            else finding
            for finding in findings
        ]
    message = f"the ranks exited with code {code} without findings in {until_s:g} s{': ' + said if said else ''}"
    return [Finding("network", "all-reduce", State.broken, message)]


def _kill_stragglers(file: Path, until_s: float, done: threading.Event) -> None:
    """Kill the ranks that are still alive after one has written its findings, or after `until_s` seconds."""
    import psutil

    from megavit.runtime.workers import running

    deadline = time.monotonic() + until_s
    while not file.exists() and time.monotonic() < deadline and not done.wait(_LOOK_EVERY_S):
        pass
    if not done.wait(_LEAVING_S):
        for child in running(_RANK):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
