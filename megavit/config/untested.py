"""Options that have not been run on a GPU yet: a run on one takes them only with `experimental=true`.

They choose how a step is computed, and each has a value in its place by which the training is the same, but for
rounding. Sizes of the layout and `train.precision` are not among them: they are what a run is. Who has run one on a GPU
takes it off the list.
"""

from dataclasses import dataclass
from enum import Enum
from functools import reduce

from megavit.config.experiment import ExperimentConfig
from megavit.config.train import Compile, GradReduce
from megavit.errors import ConfigError
from megavit.model.config import AttentionBackend, LinearBackend
from megavit.optim.config import Implementation
from megavit.parallel import cpu_backend as cpu
from megavit.parallel.config import Recompute
from megavit.validation import format_value


@dataclass(frozen=True)
class Untested:
    """A setting with values that have not been run on a GPU.

    Attributes:
        values: those.
        instead: the value that needs no asking.
        needs_cuda: those of them that the CPU cannot run either, and refuses itself.
    """

    values: tuple[Enum | bool, ...]
    instead: Enum | bool
    needs_cuda: tuple[Enum | bool, ...] = ()


_ATTENTION = (AttentionBackend.sdpa_flash, AttentionBackend.flash_attn, AttentionBackend.te)
_ADAM = (Implementation.apex, Implementation.te)
UNTESTED = {
    "model.attention_backend": Untested(_ATTENTION, AttentionBackend.sdpa, needs_cuda=_ATTENTION),
    "model.linear_backend": Untested(
        (LinearBackend.fp8, LinearBackend.te), LinearBackend.local, needs_cuda=(LinearBackend.te,)
    ),
    "optim.implementation": Untested(_ADAM, Implementation.megavit, needs_cuda=_ADAM),
    # Run on CPU processes, with the same Megatron-Core code; there are no streams, no NCCL and no CUDA kernels there.
    "train.compile": Untested((Compile.layer,), Compile.none),
    "train.grad_reduce": Untested((GradReduce.bf16,), GradReduce.fp32),
    "train.gradient_accumulation_fusion": Untested((True,), False),
    "parallel.sequence_parallel": Untested((True,), False),
    "parallel.recompute": Untested((Recompute.selective, Recompute.full), Recompute.none),
    "parallel.overlap_grad_reduce": Untested((True,), False),
    "parallel.overlap_param_gather": Untested((True,), False),
    "parallel.overlap_p2p": Untested((True,), False),
}


def untested(settings: ExperimentConfig, *, device: str) -> list[str]:
    """The options that are set and have not been run on this device, as `key=value`.

    Args:
        settings: the run's.
        device: `cpu`, where each that can run has been run, or `cuda`.
    """
    if device == "cpu":
        return []
    return [_typed(key, _value(settings, key)) for key in _set(settings)]


def check_experimental(settings: ExperimentConfig, *, device: str | None) -> None:
    """Refuse options that have not been run on this device, unless `experimental=true` asks for them.

    Args:
        settings: the run's.
        device: `cpu` or `cuda`; None for what this process computes on.

    Raises:
        ConfigError: naming all of them and what to set instead; or if nothing is there to be asked for.
    """
    if not settings.experimental and not _set(settings):
        # To ask for the device imports torch.
        return
    device = device or ("cpu" if cpu.run_on_cpu() else "cuda")
    options = untested(settings, device=device)
    if options and not settings.experimental:
        it, have = ("it", "has") if len(options) == 1 else ("them", "have")
        instead = " and ".join(_typed(key, UNTESTED[key].instead) for key in _set(settings))
        raise ConfigError(
            f"{' and '.join(options)} {have} not been run on a GPU yet; set experimental=true to try {it}, or {instead}"
        )
    # What needs CUDA is refused where it is built, by what it is.
    if (
        settings.experimental
        and not options
        and not any(_value(settings, key) in UNTESTED[key].needs_cuda for key in _set(settings))
    ):
        why = (
            "this run is on the CPU, where every option that works has been run"
            if device == "cpu"
            else "every option that is set has been run on a GPU, or is the one that needs no asking"
        )
        raise ConfigError(f"experimental=true would be ignored: {why}; leave it away")


def list_untested() -> list[str]:
    """Every option that asks for `experimental=true` on a GPU, as `key=value|value`."""
    return [f"{key}={'|'.join(_text(value) for value in option.values)}" for key, option in UNTESTED.items()]


def _set(settings: ExperimentConfig) -> list[str]:
    return [key for key, option in UNTESTED.items() if _value(settings, key) in option.values]


def _value(settings: ExperimentConfig, key: str) -> Enum | bool:
    return reduce(getattr, key.split("."), settings)  # type: ignore[return-value, arg-type]


def _typed(key: str, value: Enum | bool) -> str:
    return f"{key}={_text(value)}"


def _text(value: Enum | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(format_value(value))
