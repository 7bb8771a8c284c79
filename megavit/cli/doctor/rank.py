"""Run one rank of `megavit doctor`.

Across nodes: `torchrun … -m megavit.cli.doctor.rank [run.dir=FOLDER out=FILE]`.

A rank that hangs cannot report. Therefore each rank writes its next action to the launcher's store, and rank 0 waits
at most `run.timeout_s` and reports from the store how far each rank got.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megavit.cli.arguments import parse
from megavit.cli.doctor.arguments import DoctorArgs
from megavit.cli.doctor.disk import check_shared_folder
from megavit.cli.doctor.finding import Finding, State, in_a_line
from megavit.errors import ConfigError
from megavit.parallel.layout import rank_from_environment, world_size_from_environment
from megavit.runtime.exit_handler import run_rank, shared_store
from megavit.runtime.signals import StopRequest
from megavit.runtime.startup import silence_import_warnings

# Variable with the path of the file for rank 0's findings, set by `megavit doctor` for the ranks that it starts.
FINDINGS = "MEGAVIT_DOCTOR_FINDINGS"

# torch's own time-outs come later than this module's, because NCCL's would abort the process.
_LATER_S = 30.0
_ALL_REPORTED = "megavit/doctor/reported"
# Ranks start at different times, so their time-outs may end this many seconds apart.
_SKEW_S = 15.0
_GRACE_S = 2.0
_LOOK_EVERY_S = 0.2


def main(arguments: list[str]) -> int:
    """Measure on one of the ranks that a launcher has started; rank 0 reports the findings."""
    stop = StopRequest()
    stop.listen()
    silence_import_warnings()

    wanted = os.environ.get(FINDINGS)
    args: DoctorArgs | None = None

    def check() -> None:
        nonlocal args
        parsed, _ = parse("megavit doctor", DoctorArgs, arguments)
        if wanted is None:
            parsed.check_under_launcher()
        args = parsed

    def work() -> int:
        assert args is not None
        findings = _Rank(stop, args.timeout_s).measure(args.run_dir if wanted is None else None)
        if not findings:
            return 0
        if wanted is not None:
            # Rename the complete file: the parent kills the ranks when the file exists.
            part = Path(f"{wanted}.{rank_from_environment()}")
            part.write_text(json.dumps([finding.to_json() for finding in findings]))
            part.replace(wanted)
            return 0
        from megavit.cli.doctor.command import examine

        return examine(args, network=lambda _: findings)

    return run_rank(work, check=check, run_dir=lambda: None)


class _Rank:
    """Measure on this rank, and publish the progress to the other ranks.

    Args:
        stop: records a signal that requests this rank to stop.
        timeout_s: most seconds of the measurement.
    """

    def __init__(self, stop: StopRequest, timeout_s: float) -> None:
        self._stop, self._timeout_s = stop, timeout_s
        self._rank, self._stage = rank_from_environment(), "starting"
        self._findings: list[Finding] = []
        self._store: Any = None

    def measure(self, run_dir: Path | None) -> list[Finding]:
        """Measure the network within the time-out; if a rank hangs, find how far each rank got.

        Args:
            run_dir: folder that ranks on several hosts must share; None checks none.

        Returns:
            The findings on rank 0, or on this rank if rank 0 does not answer; else an empty list.
        """
        start = time.monotonic()
        try:
            self._store = shared_store()
        except Exception as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            text = f"rank {self._rank} on {socket.gethostname()} does not reach rank 0 at {address}: {in_a_line(error)}"
            return [_broken(text)]
        # Work in a thread that can be abandoned: NCCL and gloo wait in C++ code, which no exception interrupts.
        working = threading.Thread(target=self._work, args=(run_dir,), daemon=True)
        working.start()
        until = start + self._timeout_s
        while working.is_alive() and time.monotonic() < until:
            working.join(_LOOK_EVERY_S)
            if self._stop.asked_by is not None:
                # The launcher sends a signal as soon as another rank has ended; this rank then fails soon.
                until = min(until, time.monotonic() + _GRACE_S)
        findings = self._findings
        if working.is_alive():
            args = self._stop.asked_by
            why = f"stopped by {args}" if args else f"no answer in {self._timeout_s:g} s"
            findings = [_broken(f"{why}: rank {self._rank}: {self._stage}")]
        if self._store is None:
            return findings
        if self._rank == 0:
            findings = [self._with_others(finding) for finding in findings]
            self._store.set(_ALL_REPORTED, "1")
            return findings
        # Wait for rank 0, because the launcher ends the remaining ranks as soon as one has exited.
        try:
            self._store.wait([_ALL_REPORTED], timedelta(seconds=start + self._timeout_s + _SKEW_S - time.monotonic()))
        except Exception as error:
            why = in_a_line(error)
            return [_broken(f"rank 0 did not answer ({why}); rank {self._rank}: {self._stage}")]
        return []

    def _work(self, run_dir: Path | None) -> None:
        import torch.distributed as dist

        from megavit.cli.doctor.network import measure_network

        try:
            findings = measure_network(timeout_s=self._timeout_s + _LATER_S, say=self._say)
            if run_dir is not None and any(finding.name == "hosts" for finding in findings):
                self._say("writing to the run's folder")
                findings.append(check_shared_folder(run_dir, rank=self._rank))
            dist.destroy_process_group()
        except Exception as error:
            self._say(f"{self._stage} failed: {error if isinstance(error, ConfigError) else in_a_line(error)}")
            findings = [_broken(f"rank {self._rank}: {self._stage}")]
        self._findings = findings

    def _say(self, stage: str) -> None:
        self._stage = stage
        if self._store is not None:
            self._store.set(_key(self._rank), json.dumps([socket.gethostname(), stage]))

    def _with_others(self, finding: Finding) -> Finding:
        if finding.state is not State.broken or finding.name != "all-reduce":
            return finding
        text, others = [finding.text], range(1, world_size_from_environment())
        with contextlib.suppress(RuntimeError):
            # Some ranks may still import when this one fails.
            self._store.wait([_key(rank) for rank in others], timedelta(seconds=_GRACE_S))
        for rank in others:
            if self._store.check([_key(rank)]):
                host, stage = json.loads(self._store.get(_key(rank)))
                text.append(f"rank {rank} on {host}: {stage}")
            else:
                text.append(f"rank {rank} never answered")
        return replace(finding, text="; ".join(text), figures={"asked_to_leave_by": self._stop.asked_by})


def _key(rank: int) -> str:
    return f"megavit/doctor/{rank}"


def _broken(text: str) -> Finding:
    names = ", ".join(name for _, name in socket.if_nameindex())
    advice = (
        f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME set the network interface between the nodes (here: {names}); "
        f"NCCL_DEBUG=INFO shows what NCCL tries, NCCL_IB_DISABLE=1 disables InfiniBand; a firewall must open all "
        f"ports between the nodes"
    )
    return Finding("network", "all-reduce", State.broken, text, advice)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread may still wait in a collective.
    os._exit(code)
