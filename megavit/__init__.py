"""megavit trains Vision Transformers with model parallelism on Megatron-Core."""

import typing as _typing
from importlib import import_module as _import_module

from megavit.parallel import cpu_backend as _cpu

if _typing.TYPE_CHECKING:
    from megavit.errors import ConfigError as ConfigError
    from megavit.errors import RunError as RunError
    from megavit.inference.calls import convert as convert
    from megavit.inference.calls import evaluate as evaluate
    from megavit.inference.calls import predict as predict
    from megavit.inference.load import load as load
    from megavit.train import TrainPackage as _TrainPackage
    from megavit.train.run import Run as Run
    from megavit.train.start import compose as compose

    train: _TrainPackage

__version__ = "0.1.0"

# Whoever imports any part of megavit before Megatron-Core gets a Megatron-Core that runs on this machine.
_cpu.install_import_hook()

# Imported when they are first used: torch and Megatron-Core take seconds.
_LAZY = {
    "ConfigError": "megavit.errors",
    "Run": "megavit.train.run",
    "RunError": "megavit.errors",
    "compose": "megavit.train.start",
    "convert": "megavit.inference.calls",
    "evaluate": "megavit.inference.calls",
    "load": "megavit.inference.load",
    "predict": "megavit.inference.calls",
}
__all__ = [*_LAZY, "train"]


# A type checker would take every name to exist.
if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "train":
            return _import_module("megavit.train")
        if name not in _LAZY:
            raise AttributeError(f"module 'megavit' has no attribute {name!r}")
        from megavit.runtime.startup import import_warnings_silenced

        with import_warnings_silenced():
            return getattr(_import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
