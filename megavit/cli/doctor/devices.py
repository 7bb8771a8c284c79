"""Check the devices of training: the GPUs, as torch and the driver report them, and this machine's processor."""

import os
import subprocess
from pathlib import Path
from typing import Any

from megavit.cli.doctor.finding import Finding, State, gib, in_a_line
from megavit.parallel.host import cgroup_limits

_DRIVER_S = 20


def check_gpus() -> list[Finding]:
    """Report the device of training and, if it is CUDA, every visible GPU."""
    import torch

    from megavit.parallel.cpu_backend import run_on_cpu

    if run_on_cpu():
        return [_cpu_chosen(torch)]
    count = torch.cuda.device_count()
    figures = {"device": "cuda", "count": count}
    driver = _ask_driver("driver_version")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    message = (
        f"cuda: {count} {'GPU' if count == 1 else 'GPUs'}, CUDA {torch.version.cuda}, NCCL {nccl}, driver "
        f"{driver or 'unknown'}"
    )
    first = Finding("devices", "training on", State.ok, message, figures=figures | {"driver": driver, "nccl": nccl})
    return [first, *(_gpu(torch, index) for index in range(count))]


def _cpu_chosen(torch: Any) -> Finding:
    figures = {"device": "cpu", "count": 0}
    if torch.cuda.is_available():
        message = f"the CPU, set by MEGAVIT_DEVICE=cpu; {torch.cuda.device_count()} CUDA devices exist"
        return Finding("devices", "training on", State.ok, message, figures=figures)
    driver = _ask_driver("driver_version")
    if driver is None and not Path("/proc/driver/nvidia/version").exists():
        return Finding(
            "devices", "training on", State.ok, "the CPU: this machine has no NVIDIA driver", figures=figures
        )
    if torch.version.cuda is None:
        message, advice = f"torch {torch.__version__} was built without CUDA", "install torch's build for CUDA"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        message, advice = "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES"
    else:
        message = f"torch's CUDA {torch.version.cuda} does not start with the driver {driver}"
        advice = "nvidia-smi shows the newest CUDA version of the driver; install a torch built for it or an older one"
    message = f"the CPU, although this machine has an NVIDIA driver: {message}"
    return Finding("devices", "training on", State.missing, message, advice, figures)


def _gpu(torch: Any, index: int) -> Finding:
    name = f"GPU {index}"
    try:
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{about.major}.{about.minor}"
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        ones = torch.ones(8, 8, device=f"cuda:{index}")
        assert float(ones.mm(ones).sum()) == 512
    except Exception as error:
        advice = "exclude it with CUDA_VISIBLE_DEVICES; nvidia-smi and dmesg show more"
        return Finding("devices", name, State.broken, f"does not compute: {in_a_line(error)}", advice)
    mig = "MIG" in about.name
    figures = {
        "name": about.name, "memory_bytes": total, "free_bytes": free,
        "capability": capability, "bf16": bf16, "mig": mig,
    }  # fmt: skip
    message = f"{about.name}, {gib(total)} ({gib(free)} free), compute capability {capability}"
    if mig:
        message += ", a MIG instance: NCCL does not connect two instances of one GPU"
    if bf16:
        return Finding("devices", name, State.ok, f"{message}, bf16", figures=figures)
    advice = "train.precision=fp32: bf16_o2 needs compute capability 8.0"
    return Finding("devices", name, State.missing, f"{message}, no bf16", advice, figures)


def _ask_driver(what: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        message = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(dict.fromkeys(message.split("\n")[:-1])) or None


def check_cpu() -> list[Finding]:
    """Report this machine's processor and memory, and this process's limits."""
    import psutil

    threads, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    cores, memory = psutil.cpu_count(logical=False), psutil.virtual_memory()
    quota, limit = cgroup_limits()
    figures = {
        "model": _model(), "cores": cores, "threads": threads, "threads_allowed": allowed, "cpu_quota": quota,
        "memory_bytes": memory.total, "available_bytes": memory.available, "memory_limit_bytes": limit,
    }  # fmt: skip
    message = f"{figures['model']}, {cores or 'unknown'} cores, {threads} threads"
    if allowed < threads:
        message += f", of which this process may use {allowed}"
    advice, state = "", State.ok
    if quota is not None and quota < allowed:
        message += f", and a control group limits it to {quota:g}"
        state = State.missing
        advice = (
            f"ranks on the CPU use {allowed} threads and ignore the limit: bind the job to cores instead, with "
            f"docker's --cpuset-cpus or taskset -c"
        )
    of_memory = f"{gib(memory.total)}, {gib(memory.available)} available"
    if limit is not None and limit < memory.total:
        of_memory += f"; a control group kills processes that use more than {gib(limit)}"
    return [
        Finding("devices", "processor", state, message, advice, figures),
        Finding("devices", "memory", State.ok, of_memory),
    ]


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, os.uname().machine)
