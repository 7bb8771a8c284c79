"""Make a process's imports faster and silence their warnings."""

import atexit
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # This logger warns at each save, on ranks whose layers are all frozen.
    logging.getLogger("megatron.core.dist_checkpointing.optimizer").setLevel(logging.ERROR)
