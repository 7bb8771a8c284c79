"""Settings that have not been verified on a GPU; a run on a GPU names those it uses.

They choose how a step is computed, and the default value of each trains the same, except for rounding. The sizes of
the layout and `train.precision` are not listed: they define the run. Whoever verifies a value on a GPU removes it here.
"""

from collections.abc import Mapping
from typing import Any

from megavit.validation import format_value

# Values as a user types them.
UNTESTED: dict[str, tuple[str, ...]] = {
    # CUDA only.
    "model.attention_backend": ("sdpa_flash", "flash_attn", "te"),
    # te: CUDA only.
    "model.linear_backend": ("fp8", "te"),
    # CUDA only.
    "optim.implementation": ("apex", "te"),
    # Verified on CPU processes, with the same Megatron-Core code but without streams, NCCL and CUDA kernels.
    "train.compile": ("layer",),
    "train.grad_reduce": ("bf16",),
    "train.gradient_accumulation_fusion": ("true",),
    "parallel.sequence_parallel": ("true",),
    "parallel.recompute": ("selective", "full"),
    "parallel.overlap_grad_reduce": ("true",),
    "parallel.overlap_param_gather": ("true",),
    "parallel.overlap_p2p": ("true",),
}


def untested(settings: Mapping[str, Any], *, device: str) -> list[str]:
    """Return the settings in use that have not been verified on this device, as `key=value`.

    Args:
        settings: every setting of the run by its dotted path (see `compose.flatten`).
        device: `cpu`, where everything that can run has been verified, or `cuda`.
    """
    if device == "cpu":
        return []
    typed = {key: str(format_value(settings[key])) for key in UNTESTED}
    return [f"{key}={value}" for key, value in typed.items() if value in UNTESTED[key]]


def list_untested() -> list[str]:
    """Return every setting that has not been verified on a GPU, as `key=value|value`."""
    return [f"{key}={'|'.join(values)}" for key, values in UNTESTED.items()]
