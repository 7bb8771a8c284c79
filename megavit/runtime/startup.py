"""Make a process's imports faster and silence their warnings."""

import atexit
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "torch.utils.cpp_extension",
    # This logger warns at each save, on ranks whose layers are all frozen.
    "megatron.core.dist_checkpointing.optimizer",
)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection during imports and set-up, and exclude the objects that exist at the end from it.

    torch and Megatron-Core create half a million permanent objects. Scanning them repeatedly takes a third of the
    imports' time, and later a quarter of a second of every full collection; each save runs one.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Python destroys modules at its exit, and some libraries warn of objects that are still frozen then. Register
        # the hook only once.
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
        gc.enable()


def silence_import_warnings() -> None:
    """Silence the warnings of Megatron-Core and torch about missing optional packages."""
    # Otherwise each rank warns of every missing optional package, and of missing CUDA.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def import_warnings_silenced() -> Iterator[None]:
    """Silence these warnings while the body runs, then restore filters and loggers."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        silence_import_warnings()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
