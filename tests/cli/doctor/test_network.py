"""Test the doctor's all-reduce: right, wrong, hanging, and across hosts."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch.distributed as dist

from megavit.cli.doctor import network
from megavit.cli.doctor.disk import check_shared_folder
from megavit.cli.doctor.finding import Finding, State
from megavit.cli.doctor.network import bandwidths, measure_network
from megavit.cli.doctor.ranks import check_network
from tests.cli.doctor.machines import on_cpu, only
from tests.distributed import run_ranks


def measure(*, stages: list[str] | None = None) -> list[Finding]:
    try:
        return measure_network(timeout_s=60, say=(stages if stages is not None else []).append)
    finally:
        dist.destroy_process_group()


def test_two_ranks_reduce_exactly_and_report_both_bandwidths():
    first, second = run_ranks(measure, 2)
    assert first == second
    (found,) = first
    assert (found.section, found.name, found.state) == ("network", "all-reduce, gloo", State.ok)
    figures = found.figures
    assert figures["ranks"] == 2
    assert figures["bytes"] == 4 * 2**20
    assert 0 < figures["latency_s"] < 1
    assert 1e6 < figures["algorithm_bytes_per_s"] < 1e12
    assert "sums exact" in found.text


def test_bus_bandwidth_is_what_nccl_tests_call_so():
    assert bandwidths(1000, 2.0, ranks=4) == {"algorithm_bytes_per_s": 500.0, "bus_bytes_per_s": 750.0}
    assert bandwidths(1000, 2.0, ranks=1)["bus_bytes_per_s"] == 0


def measure_wrongly() -> list[Finding]:
    reduce = dist.all_reduce

    def off_by_one(values, **settings):
        reduce(values, **settings)
        if dist.get_rank() == 1 and len(values) > 1000:
            values[1000] += 1

    with mock.patch.object(dist, "all_reduce", off_by_one):
        return measure()


def test_one_wrong_sum_on_one_rank_is_reported_by_every_rank():
    for findings in run_ranks(measure_wrongly, 2):
        (found,) = findings
        assert found.state is State.broken
        assert found.text.startswith(f"1 of {2 * 2**20:,} sums are wrong over 2 ranks")


def measure_on_two_hosts(folder) -> tuple[list[Finding], Finding]:
    from megavit.parallel.layout import rank_from_environment

    rank = rank_from_environment()
    own = network.provenance()
    other = {**own, "host": f"node{rank}", "versions": {**own["versions"], "torch": f"2.{11 + rank}"}}
    with mock.patch.object(network, "provenance", return_value=other):
        try:
            return measure_network(timeout_s=60, say=lambda stage: None), check_shared_folder(folder, rank=rank)
        finally:
            dist.destroy_process_group()


def test_hosts_are_named_with_what_differs_and_must_share_the_run_folder(tmp_path):
    (findings, folder), _ = run_ranks(measure_on_two_hosts, 2, tmp_path / "run")
    hosts = only(findings, "hosts")
    assert hosts.state is State.missing
    assert hosts.text == "node0: ranks 0; node1: ranks 1; differences: torch 2.11, 2.12"
    assert folder.state is State.ok
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for _, folder in run_ranks(measure_on_two_hosts, 2, tmp_path / "file"):
        assert folder.state is State.broken
        assert "cannot be written by rank 0" in folder.text


# Start the ranks in a new process, as the command does, and send a signal to one of them.
START = """
import json, signal, sys, threading, time
import psutil
from megavit.cli.doctor.finding import Finding
from megavit.cli.doctor.ranks import check_network

before, rank, name, timeout_s = json.loads(sys.argv[1]), *sys.argv[2:]

def hit():
    while True:
        for child in psutil.Process().children():
            try:
                if "megavit.cli.doctor.rank" in child.cmdline() and child.environ().get("RANK") == rank:
                    child.send_signal(getattr(signal, name))
                    return
            except psutil.Error:
                pass
        time.sleep(0.02)

if name:
    threading.Thread(target=hit, daemon=True).start()
findings = check_network(None, [Finding.from_json(found) for found in before], timeout_s=float(timeout_s))
print(json.dumps([found.to_json() for found in findings]))
"""


def started(rank: str, name: str, *, timeout_s: float) -> list[Finding]:
    before = json.dumps([finding.to_json() for finding in on_cpu()])
    command = [sys.executable, "-c", START, before, rank, name, str(timeout_s)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    return [Finding.from_json(found) for found in json.loads(result.stdout.splitlines()[-1])]


def test_two_ranks_are_started_on_a_cpu():
    findings = started("", "", timeout_s=60)
    assert only(findings, "ranks").text.startswith("2, ")
    assert only(findings, "all-reduce, gloo").state is State.ok


@pytest.mark.parametrize(
    ("rank", "name", "output"),
    [
        pytest.param("1", "SIGSTOP", "rank 1 never answered", marks=pytest.mark.slow),
        ("1", "SIGKILL", "rank 1 was ended by SIGKILL"),
        pytest.param("0", "SIGSTOP", "rank 0 did not answer", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_or_dies_is_reported_within_the_time_limit(rank, name, output, figure):
    start = time.monotonic()
    found = only(started(rank, name, timeout_s=5), "all-reduce")
    figure(f"doctor, rank {rank} gets {name}: reported in {time.monotonic() - start:.0f} s with a time-out of 5 s")
    assert found.state is State.broken
    assert output in found.text
    assert time.monotonic() - start < 100


def test_a_missing_interface_is_reported_with_the_existing_ones(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nobody0")
    found = only(started("", "", timeout_s=30), "all-reduce")
    assert found.state is State.broken
    assert "nobody0" in found.text
    assert "GLOO_SOCKET_IFNAME" in found.advice
    assert "lo" in found.advice


def test_ranks_are_not_started_where_torch_cannot_be_used():
    torch = Finding("imports", "torch", State.broken, "ImportError")
    (found,) = check_network(None, [torch, *on_cpu()], timeout_s=5)
    assert (found.state, found.text) == (State.broken, "not run: torch cannot be used")
    (found,) = check_network(None, [replace(torch, state=State.ok)], timeout_s=5)
    assert found.text == "not run: the device of training is not known"
