"""Run one training on two hosts: its losses, the bytes on the cable, and how both hosts exit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megavit.config.compose import compose
from megavit.planner.communication import Collective, Split, Work, data_exchanges, tensor_exchanges
from tests.distributed import run_ranks
from tests.parallel.test_traffic import FP32, MICRO_BATCH, Seen, record_run
from tests.reference import SMALL
from tests.runtime.two_hosts import ADDRESSES, CABLE, Host, two_hosts

BATCH, STEPS, RANKS = 64, 30, 4
# Eight micro batches for each of two data-parallel ranks: TP sends much, DP as much as always.
SETTINGS = ["recipe=digits", *SMALL, "parallel.tp=2", f"train.global_batch={BATCH}"]
WORK = Work(MICRO_BATCH, BATCH // 2 // MICRO_BATCH, value_bytes=FP32, grad_bytes=FP32, image_bytes=64, label_bytes=8)
LAYOUT = Split(tp=2, dp=2)
# The start of two agents and four ranks takes most of this time on a busy machine of two cores.
DEADLINE_S = 240
# Much shorter than the time-out of a collective that waits for a silent rank (run.timeout_s, ten minutes).
GONE_S = 90

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * DEADLINE_S)]


@dataclass
class Ended:
    """The record of a finished run on two hosts.

    Attributes:
        run_dir: the run's folder.
        codes: exit code of each host's torchrun; None if it had to be killed.
        errors: stderr of each host's torchrun.
        left_s: seconds until each exited, from the action on the run or else from the start.
        sent: bytes that each host had sent, by the number of lines of metrics written so far.
    """

    run_dir: Path
    codes: list[int | None] = field(default_factory=lambda: [None, None])
    errors: list[str] = field(default_factory=list)
    left_s: list[float | None] = field(default_factory=lambda: [None, None])
    sent: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def losses(self) -> list[tuple[float, float]]:
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [(row["loss"], row["grad_norm"]) for row in rows if row["split"] == "train"]

    @property
    def exit_record(self) -> dict:
        return json.loads((self.run_dir / "exit.json").read_text())

    def host_of(self, rank: int) -> str:
        first_line = (self.run_dir / "logs" / f"rank_{rank:05d}.log").read_text().splitlines()[0]
        return first_line.rpartition(" on ")[2]


# megavit's torchrun, which jobs use, and torch's own.
OURS, TORCHS = ["megavit.runtime.torchrun"], ["torch.distributed.run", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]


def torchrun(launcher: list[str], *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", *launcher, "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={ADDRESSES[0]}:29511", "--rdzv-id=two-hosts", "-m", "megavit.train", *overrides,
    ]  # fmt: skip


def run_on(
    hosts: tuple[Host, Host],
    run_dir: Path,
    *overrides: str,
    launcher: list[str] = OURS,
    after_steps: int = 0,
    act: Callable | None = None,
) -> Ended:
    """Run until both hosts have exited; after some steps call `act` with both hosts' torchruns."""
    ended, command = Ended(run_dir), torchrun(launcher, *SETTINGS, f"run.dir={run_dir}", *overrides)
    environment = {**os.environ, "MEGAVIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    said = [run_dir.parent / f"{host.name}.err" for host in hosts]
    running = []
    for host, path in zip(hosts, said, strict=True):
        with path.open("w") as stderr:
            running.append(host.start(*command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment))
    since, deadline = time.monotonic(), time.monotonic() + DEADLINE_S
    while None in ended.codes and time.monotonic() < deadline:
        metrics = run_dir / "metrics.jsonl"
        steps = metrics.read_text().count("\n") if metrics.exists() else 0
        ended.sent.setdefault(steps, (hosts[0].sent_bytes(), hosts[1].sent_bytes()))
        if act is not None and steps >= after_steps:
            act(running)
            act, since = None, time.monotonic()
        for index, process in enumerate(running):
            if ended.codes[index] is None and process.poll() is not None:
                ended.codes[index], ended.left_s[index] = process.returncode, time.monotonic() - since
        time.sleep(0.02)
    ended.errors = [path.read_text() for path in said]
    return ended


def reference(run_dir: str) -> Seen:
    """Build the same layout in one process group on this host; return what this rank holds and sends."""
    return record_run(compose([*SETTINGS, f"train.steps={STEPS}", f"run.dir={run_dir}"]), profiles=False)


def data_bytes(seen: Seen) -> float:
    """Return the bytes that this rank sends to its data-parallel peer in a step.

    gloo reduce-scatters by an all-reduce: it sends twice the bytes of a ring reduce-scatter (torch 2.15).
    """
    exchanges = data_exchanges(seen.share.weights, split=LAYOUT, work=WORK)
    return sum(part.sent_bytes * (1 + (part.collective is Collective.reduce_scatter)) for part in exchanges)


def tensor_bytes(seen: Seen) -> float:
    """Return the bytes that this rank sends to its tensor-parallel peer in a step."""
    exchanges = tensor_exchanges(seen.shape, split=LAYOUT, work=WORK, share=seen.share)
    return sum(part.sent_bytes for part in exchanges)


def bytes_per_step(sent: dict[int, tuple[int, int]]) -> float:
    """Return the bytes a host sends in a step: the mean over both hosts and over steps in the middle of the run."""
    first, *_, last = [steps for steps in sent if 5 <= steps < STEPS]
    return sum(after - before for before, after in zip(sent[first], sent[last], strict=True)) / 2 / (last - first)


def test_two_hosts_train_with_tp_inside_and_dp_across(tmp_path, figure):
    with two_hosts() as hosts:
        ended = run_on(hosts, tmp_path / "run", f"train.steps={STEPS}")
    assert ended.codes == [0, 0], ended.errors
    assert ended.exit_record == {"code": 0, "error": None}
    # torchrun chooses the order of the hosts' ranks.
    on = [ended.host_of(rank) for rank in range(RANKS)]
    assert on[0] == on[1] != on[2] == on[3]
    assert set(on) == {host.name for host in hosts}

    seen = run_ranks(reference, RANKS, str(tmp_path / "one_host"), timeout_s=DEADLINE_S)
    alone = Ended(tmp_path / "one_host").losses
    assert len(alone) == STEPS
    assert ended.losses == alone

    crossed, dp, tp = bytes_per_step(ended.sent), 2 * data_bytes(seen[0]), 2 * tensor_bytes(seen[0])
    # The rest is collectives of control data, frames and acknowledgements; a step that is observed late counts late.
    assert 0.9 * dp < crossed < 1.25 * dp
    # TP across the hosts would send this instead.
    assert tp > 5 * dp
    figure(
        f"two hosts, DP 2 × TP 2: both left after {max(ended.left_s):.0f} s, {STEPS} losses equal to the bit; a host "
        f"sent {crossed:,.0f} bytes a step, {dp:,.0f} of them by DP's arithmetic; TP's {tp:,.0f} stayed inside"
    )


@pytest.mark.parametrize(("launcher", "code"), [(OURS, 75), (TORCHS, 1)], ids=["ours", "torch's"])
def test_a_signal_to_one_hosts_torchrun_saves_and_ends_the_run_on_both(launcher, code, tmp_path, figure):
    with two_hosts() as hosts:
        ended = run_on(
            hosts, tmp_path / "run", "train.steps=1000000", launcher=launcher,
            after_steps=5, act=lambda running: running[1].send_signal(signal.SIGUSR1),
        )  # fmt: skip
    # torch's torchrun exits with its own code, whatever the ranks' code was.
    assert ended.codes == [code, code], ended.errors
    assert ended.exit_record == {"code": 75, "error": None}
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{len(ended.losses):08d}"
    figure(f"two hosts, SIGUSR1 to one torchrun: saved, both left after {max(ended.left_s):.0f} s")


def test_a_host_that_is_gone_ends_the_run_on_the_other_with_that_reason(tmp_path, figure):
    run_dir = tmp_path / "run"
    with two_hosts() as hosts:

        def kill(running: list[subprocess.Popen]) -> None:
            (gone,) = (host for host in hosts if host.name == Ended(run_dir).host_of(RANKS - 1))
            gone.kill()

        ended = run_on(hosts, run_dir, "train.steps=1000000", after_steps=5, act=kill)
    assert sorted(ended.codes) == [-signal.SIGKILL, 1], ended.errors
    assert ended.exit_record["code"] == 1
    assert "has lost the connection to another rank" in ended.exit_record["error"]
    assert max(ended.left_s) < GONE_S
    figure(f"two hosts, one killed: the other left after {max(ended.left_s):.0f} s")
