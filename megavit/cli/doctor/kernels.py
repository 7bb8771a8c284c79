"""Check which attention kernels run here, forward and backward, and which `model.attention_backend` they allow.

Shapes: B images, A heads, N tokens, D head width.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from megavit.cli.doctor.finding import Finding, State, in_a_line
from megavit.cli.doctor.packages import check_flash_attn, check_transformer_engine

# One image, 2 heads, 16 tokens, and the head width of ViT-B and ViT-L.
_SHAPE = (1, 2, 16, 64)
_TORCHS = {
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}


def check_kernels() -> list[Finding]:
    """Try torch's kernels in fp32 and bf16 on the device of training, and the kernels of optional packages."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megavit.parallel.cpu_backend import run_on_cpu

    device = "cpu" if run_on_cpu() else "cuda"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def attend_with(backend: SDPBackend, dtype: torch.dtype) -> None:
        with sdpa_kernel(backend):
            _attend(dtype, device)

    of_torch = {
        name: {key: _refusal(partial(attend_with, getattr(SDPBackend, member), dtype)) for key, dtype in dtypes.items()}
        for name, member in _TORCHS.items()
    }
    unasked = {key: _refusal(partial(_attend, dtype, device)) for key, dtype in dtypes.items()}
    return [
        _sdpa(unasked, device),
        _sdpa_flash(of_torch["flash"]["bf16"], device),
        _packages("flash_attn", check_flash_attn()[0]),
        _packages("te", check_transformer_engine()[0]),
        *(_torchs(name, refusals) for name, refusals in of_torch.items()),
    ]


def _attend(dtype: Any, device: str) -> None:
    import torch
    import torch.nn.functional as F

    q_BAND, k_BAND, v_BAND = parts_BAND = torch.randn(3, *_SHAPE, dtype=dtype, device=device).unbind()
    for part_BAND in parts_BAND:
        part_BAND.requires_grad_()
    F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND).sum().backward()
    for part_BAND in parts_BAND:
        assert part_BAND.grad is not None and bool(part_BAND.grad.isfinite().all()), "a gradient is not finite"


def _refusal(work: Callable[[], None]) -> str | None:
    """Return why `work` did not run; None if it ran."""
    with warnings.catch_warnings(record=True) as text:
        # torch reports its reasons as warnings.
        warnings.simplefilter("always")
        try:
            work()
        except Exception as error:
            reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in text]
            if reasons or "No viable backend" not in str(error):
                return " ".join(reasons) or in_a_line(error)
            return "torch has no such kernel for this device"
    return None


def _sdpa(refusals: dict[str, str | None], device: str) -> Finding:
    import torch

    from megavit.model.layers.attention_backends import sdpa_choice

    if any(refusals.values()):
        text = f"does not run on {device}: {_describe(refusals)}"
        return Finding("kernels", "sdpa", State.broken, text, "install a torch that was built for this device")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    chosen = {key: sdpa_choice(torch.empty(_SHAPE, dtype=dtype, device=device)) for key, dtype in dtypes.items()}
    text = ", ".join(f"{kernel} in {key}" for key, kernel in chosen.items())
    return Finding("kernels", "sdpa", State.ok, f"runs on {device}: {text}", figures=chosen)


def _sdpa_flash(refusal: str | None, device: str) -> Finding:
    if device == "cpu":
        text = "megavit uses it only on CUDA, and training is on the CPU; there sdpa uses the same kernel"
    elif refusal is not None:
        text = f"does not run: {refusal}"
    else:
        return Finding("kernels", "sdpa_flash", State.ok, "runs on cuda in bf16")
    return Finding("kernels", "sdpa_flash", State.missing, text, "model.attention_backend=sdpa")


def _packages(attention: str, package: Finding) -> Finding:
    if package.state is State.ok:
        return Finding("kernels", attention, State.ok, "runs on cuda in bf16")
    return Finding("kernels", attention, State.missing, f"{package.name}: {package.text}")


def _torchs(name: str, refusals: dict[str, str | None]) -> Finding:
    ran = [key for key, reason in refusals.items() if reason is None]
    text = "; ".join(part for part in (ran and f"ran in {' and '.join(ran)}", _describe(refusals)) if part)
    return Finding(
        "kernels", f"torch's {name}", State.ok if ran else State.missing, text, figures={"refusals": refusals}
    )


def _describe(refusals: dict[str, str | None]) -> str:
    reasons: dict[str, list[str]] = {}
    for key, reason in refusals.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(key)
    return "; ".join(f"does not run in {' and '.join(keys)}: {reason}" for reason, keys in reasons.items())
