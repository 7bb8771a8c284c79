"""Check an all-reduce across ranks: exact sums, latency of a small one, bandwidth of a large one."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavit.cli.doctor.finding import Finding, State
from megavit.metrics.provenance import provenance
from megavit.parallel.layout import choose_device, join_world

_SMALL_BYTES = 4
_LARGE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_WARM_UP = 3
_REPEATS = {_SMALL_BYTES: 50, _LARGE_BYTES["cpu"]: 10, _LARGE_BYTES["cuda"]: 20}


def about_this_rank(device: torch.device) -> dict[str, Any]:
    """Return this rank's host, device and versions; all but the host should be equal on all ranks."""
    source = provenance()
    return {
        "host": source["host"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": source["python"],
        **{name: source["versions"].get(name) for name in ("megavit", "torch", "megatron-core")},
    }


def measure_network(*, timeout_s: float, say: Callable[[str], None]) -> list[Finding]:
    """Join the other ranks and measure; every rank calls this.

    Args:
        timeout_s: seconds after which a collective that waits for a lost rank fails.
        say: called with a description of the next action, before the action that may hang.

    Returns:
        The findings, on every rank.
    """
    say("choosing its device")
    device = choose_device()
    say("joining the other ranks")
    join_world(device, timeout_s=timeout_s)
    findings = []
    # Training sends tensors on CUDA with NCCL, and Python objects with gloo.
    for kind in dict.fromkeys([device, torch.device("cpu")]):
        backend = "nccl" if kind.type == "cuda" else "gloo"
        findings.append(_all_reduce(kind, backend, say=say))
    say("exchanging hosts and versions")
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, about_this_rank(device))
    return [*findings, *_hosts(ranks)]


def _all_reduce(device: torch.device, backend: str, *, say: Callable[[str], None]) -> Finding:
    ranks, name = dist.get_world_size(), f"all-reduce, {backend}"
    large = _LARGE_BYTES[device.type]
    seconds = {}
    for size in (_SMALL_BYTES, large):
        say(f"an all-reduce of {size} bytes with {backend}")
        wrong = _wrong_sums(size, device)
        if wrong:
            text = f"{wrong:,} of {size // 4 * ranks:,} sums are wrong over {ranks} ranks, {size} bytes"
            advice = "training would compute wrong results; find the link with NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
            return Finding("network", name, State.broken, text, advice, {"wrong": wrong})
        seconds[size] = _seconds(size, device)
    rates = bandwidths(large, seconds[large], ranks=ranks)
    figures = {"ranks": ranks, "backend": backend, "bytes": large, "latency_s": seconds[_SMALL_BYTES], **rates}
    if ranks == 1:
        return Finding("network", name, State.ok, "one rank: it starts and sends nothing", figures=figures)
    text = (
        f"{ranks} ranks, sums exact; {_SMALL_BYTES} bytes in {_time(seconds[_SMALL_BYTES])}, {large // 2**20} MiB in "
        f"{_time(seconds[large])}: {rates['algorithm_bytes_per_s'] / 1e9:.3g} GB/s, bus bandwidth "
        f"{rates['bus_bytes_per_s'] / 1e9:.3g} GB/s"
    )
    return Finding("network", name, State.ok, text, figures=figures)


def bandwidths(size: int, seconds: float, *, ranks: int) -> dict[str, float]:
    """Return the algorithm bandwidth and the bus bandwidth of an all-reduce, in bytes per second.

    Algorithm bandwidth is the reduced bytes over the time. Bus bandwidth is 2(n − 1)/n times that, and can be compared
    with the hardware's bandwidth for any number of ranks.

    Args:
        size: bytes of each rank's tensor.
        seconds: time of the slowest rank.
        ranks: n, the number of ranks.

    Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.
    """
    rate = size / seconds
    return {"algorithm_bytes_per_s": rate, "bus_bytes_per_s": rate * 2 * (ranks - 1) / ranks}


def _wrong_sums(size: int, device: torch.device) -> int:
    """Count the wrong elements on all ranks; the numbers are integers so small that their fp32 sums are exact."""
    ranks = dist.get_world_size()
    numbers = torch.arange(size // 4, device=device) % 97
    sums = (numbers + dist.get_rank()).float()
    dist.all_reduce(sums)
    expected = (numbers * ranks + ranks * (ranks - 1) // 2).float()
    # Exchange the counts as Python objects on the CPU, not by the all-reduce under test.
    counts: list[Any] = [None] * ranks
    dist.all_gather_object(counts, int((sums != expected).sum()))
    return sum(counts)


def _seconds(size: int, device: torch.device) -> float:
    """Return the median time of an all-reduce on the slowest rank, in seconds."""
    values, times = torch.zeros(size // 4, device=device), []
    for repeat in range(_WARM_UP + _REPEATS[size]):
        _wait(values)
        start = time.perf_counter()
        dist.all_reduce(values)
        _wait(values)
        if repeat >= _WARM_UP:
            times.append(time.perf_counter() - start)
    slowest = torch.tensor([median(times)], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _wait(values: Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize(values.device)


def _hosts(ranks: list[dict[str, Any]]) -> list[Finding]:
    by_host: dict[str, list[int]] = {}
    for rank, about in enumerate(ranks):
        by_host.setdefault(about["host"], []).append(rank)
    if len(by_host) == 1:
        return []
    text = "; ".join(f"{host}: ranks {', '.join(map(str, of_host))}" for host, of_host in by_host.items())
    figures = {"ranks": ranks}
    differing = [
        f"{key} {', '.join(sorted(found))}"
        for key in ranks[0]
        if key != "host" and len(found := {str(about[key]) for about in ranks}) > 1
    ]
    if differing:
        advice = "give every node the same environment and the same devices"
        return [
            Finding("network", "hosts", State.missing, f"{text}; differences: {'; '.join(differing)}", advice, figures)
        ]
    return [Finding("network", "hosts", State.ok, text, figures=figures)]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
