"""The all-reduce across the ranks: whether its sums are exact, how long a small one takes, what a large one carries."""

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
    """What is told of each rank, and should not differ between hosts."""
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
        timeout_s: seconds after which a collective fails that waits for a lost rank.
        say: is told what comes next, before it may hang.

    Returns:
        The findings, on every rank.
    """
    say("choosing its device")
    device = choose_device()
    say("joining the other ranks")
    join_world(device, timeout_s=timeout_s)
    findings = []
    # As training does: tensors by NCCL on CUDA, and what ranks agree on by gloo.
    for kind in dict.fromkeys([device, torch.device("cpu")]):
        backend = "nccl" if kind.type == "cuda" else "gloo"
        findings.append(_all_reduce(kind, backend, say=say))
    say("telling each other what they are")
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, about_this_rank(device))
    return [*findings, *_hosts(ranks)]


def _all_reduce(device: torch.device, backend: str, *, say: Callable[[str], None]) -> Finding:
    ranks, name = dist.get_world_size(), f"all-reduce, {backend}"
    large = _LARGE_BYTES[device.type]
    seconds = {}
    for size in (_SMALL_BYTES, large):
        say(f"an all-reduce of {size} bytes by {backend}")
        wrong = _wrong_sums(size, device)
        if wrong:
            text = f"{wrong:,} of {size // 4 * ranks:,} sums are wrong over {ranks} ranks, {size} bytes"
            advice = "no training is right there; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 tell which way is at fault"
            return Finding("network", name, State.broken, text, advice, {"wrong": wrong})
        seconds[size] = _seconds(size, device)
    rates = bandwidths(large, seconds[large], ranks=ranks)
    figures = {"ranks": ranks, "backend": backend, "bytes": large, "latency_s": seconds[_SMALL_BYTES], **rates}
    if ranks == 1:
        return Finding("network", name, State.ok, "one rank: it starts, and nothing is sent", figures=figures)
    text = (
        f"{ranks} ranks, sums exact; {_SMALL_BYTES} bytes in {_time(seconds[_SMALL_BYTES])}, {large // 2**20} MiB in "
        f"{_time(seconds[large])}: {rates['algorithm_bytes_per_s'] / 1e9:.3g} GB/s, on the bus "
        f"{rates['bus_bytes_per_s'] / 1e9:.3g} GB/s"
    )
    return Finding("network", name, State.ok, text, figures=figures)


def bandwidths(size: int, seconds: float, *, ranks: int) -> dict[str, float]:
    """The two rates of an all-reduce, in bytes per second.

    Algorithm bandwidth is what is reduced over the time it takes; bus bandwidth multiplies that by 2(n − 1)/n, and so
    can be held against the hardware's own whatever the number of ranks.

    Args:
        size: bytes that each rank brings.
        seconds: that the slowest rank took.
        ranks: n.

    Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.
    """
    rate = size / seconds
    return {"algorithm_bytes_per_s": rate, "bus_bytes_per_s": rate * 2 * (ranks - 1) / ranks}


def _wrong_sums(size: int, device: torch.device) -> int:
    """Elements that are not what they must be, on all ranks; whole numbers this small have exact sums in fp32."""
    ranks = dist.get_world_size()
    numbers = torch.arange(size // 4, device=device) % 97
    sums = (numbers + dist.get_rank()).float()
    dist.all_reduce(sums)
    expected = (numbers * ranks + ranks * (ranks - 1) // 2).float()
    # Handed on by another way than the one in doubt: that of Python objects, on the CPU.
    counts: list[Any] = [None] * ranks
    dist.all_gather_object(counts, int((sums != expected).sum()))
    return sum(counts)


def _seconds(size: int, device: torch.device) -> float:
    """Median time of an all-reduce, of the rank where it is longest."""
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
            Finding("network", "hosts", State.missing, f"{text}; they differ: {'; '.join(differing)}", advice, figures)
        ]
    return [Finding("network", "hosts", State.ok, text, figures=figures)]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
