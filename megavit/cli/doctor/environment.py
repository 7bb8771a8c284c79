"""Report environment variables that affect a run, and installed launchers; values that may be secret are not shown."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from megavit.cli.doctor.finding import Finding, State

_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_", "SLURM_NTASKS", "SLURM_GPUS")
_NAMES = (
    "CUDA_VISIBLE_DEVICES", "MEGAVIT_DEVICE", "MKL_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK",
    "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_JOB_NODELIST",
)  # fmt: skip
_SECRET = re.compile(r"key|token|secret|passw|passphrase|credential|auth", re.IGNORECASE)

# Launchers, each with a variable that only this launcher sets; the innermost first.
_LAUNCHERS = {
    "torchrun": "TORCHELASTIC_RUN_ID",
    "Slurm": "SLURM_JOB_ID",
    "Azure ML": "AZUREML_RUN_ID",
    "Kubernetes": "KUBERNETES_SERVICE_HOST",
}

_TOOLS = {
    "Slurm": ("sbatch", "srun", "scontrol"),
    "Azure ML": ("az",),
    "Kubernetes": ("kubectl",),
    "containers": ("enroot", "apptainer", "docker"),
}
_VERSION_S = 10


def check_settings(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Report variables that torch, NCCL, gloo and megavit read, from a list of variables without secrets."""
    named = {name: value for name, value in sorted(environment.items()) if name.startswith(_PREFIXES) or name in _NAMES}
    variables = {name: "set, not shown" if _SECRET.search(name) else value for name, value in named.items()}
    found = [launcher for launcher, name in _LAUNCHERS.items() if name in environment]
    message = ", in ".join(found) or "none: this process was started from a shell"
    threads = environment.get("OMP_NUM_THREADS")
    take = f"OMP_NUM_THREADS={threads} each" if threads else "OMP_NUM_THREADS is not set: ranks share the cores"
    findings = [
        Finding("settings", "launcher", State.ok, message, figures={"launchers": found}),
        Finding(
            "settings",
            "environment",
            State.ok,
            " ".join(f"{k}={v}" for k, v in variables.items()) or "no such variable is set",
            figures=variables,
        ),
        Finding(
            "settings",
            "threads",
            State.ok,
            f"ranks on the CPU: {take}",
        ),
    ]
    return findings


def check_tools() -> list[Finding]:
    """Report the programs that `megavit submit` may call, by kind of cluster."""
    findings = []
    for where, names in _TOOLS.items():
        found = {name: path for name in names if (path := shutil.which(name)) is not None}
        message = ", ".join(f"{name} {_version(name)}" if name == "sbatch" else name for name in found)
        absent = [name for name in names if name not in found]
        text = "; ".join(part for part in (message, absent and f"{', '.join(absent)} not installed") if part)
        advice = "" if found else "only needed on the machine that submits such jobs"
        findings.append(
            Finding("launchers", where, State.ok if found else State.missing, text, advice, {"found": found})
        )
    return findings


def _version(program: str) -> str:
    try:
        message = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_VERSION_S)
    except (OSError, subprocess.SubprocessError):
        return "(does not answer)"
    return message.stdout.strip() if message.returncode == 0 else "(its --version fails)"
