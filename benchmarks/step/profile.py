"""Profile a step's time by kind of kernel."""

import re
from collections.abc import Callable
from typing import Any

import torch

# Kinds with the pattern of operator or kernel names; the first match counts.
_KINDS = (
    ("compiled", r"triton|cpp_fused|Compiled"),
    ("attention", r"flash|fmha|attention|softmax|sdpa"),
    ("optimizer", r"adam|lamb|lars|multi_tensor|_foreach"),
    ("matmul", r"mm$|gemm|cutlass|cublas|nvjet|linear|matmul|mkldnn|onednn|conv|xmma|wgmma"),
    ("norm", r"layer_norm|layernorm|batch_norm|vector_norm|linalg_norm"),
    ("communication", r"nccl|gloo|c10d|all_reduce|allreduce|allgather|reduce_scatter"),
    ("gelu", r"gelu"),
    ("copy", r"copy|memcpy|cat|clone|contiguous|fill|zero|memset|_to_"),
    ("reduction", r"sum|mean|reduce|norm|argsort|sort|topk"),
    ("elementwise", r"add|mul|div|sub|elementwise|vectorized|where|pow|neg|sqrt|bitwise|scatter|gather|index"),
)


def kind_of(name: str) -> str:
    """Return the kind of an operator or kernel, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the seconds of one step by kind of kernel, the largest first: GPU kernels, or operators on a CPU.

    Args:
        step: function that runs one step.
        device: device of the step.
    """
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as watched:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: dict[str, float] = {}
    for event in watched.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent and (not on_gpu or event.device_type.name == "CUDA"):
            kind = kind_of(event.key)
            seconds[kind] = seconds.get(kind, 0.0) + spent / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
