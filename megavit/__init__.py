"""megavit trains Vision Transformers with model parallelism on Megatron-Core."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from megavit.parallel import cpu_backend as _cpu

if _TYPE_CHECKING:
    from megavit.inference.load import TrainedEncoder

__version__ = "0.1.0"

# Whoever imports any part of megavit before Megatron-Core gets a Megatron-Core that runs on this machine.
_cpu.install_import_hook()


def load(path: "str | _Path", *settings: str) -> "TrainedEncoder":
    """Load a trained network as an ordinary torch module (see `megavit.inference.load.load`)."""
    import warnings

    from megavit.runtime.startup import silence_import_warnings

    with warnings.catch_warnings():
        silence_import_warnings()
        from megavit.inference.load import load as load_run

        return load_run(path, *settings)
