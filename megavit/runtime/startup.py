"""What a process's imports say, and what they cost."""

import atexit
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Look for no garbage while modules are imported and a run gets ready, nor ever among what that leaves.

    torch and Megatron-Core leave half a million objects that stay. Gone through again and again they cost a third of
    the imports' time, and a quarter of a second of every full collection later, of which each save makes one.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Python takes modules apart at its end, and some libraries complain of what is kept then. Once is enough.
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
        gc.enable()


def silence_import_warnings() -> None:
    """Silence what Megatron-Core and torch say of optional packages while they are imported."""
    # Each rank would say of every optional package, and of CUDA, that it is not there.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # At each save, on ranks whose layers are all frozen.
    logging.getLogger("megatron.core.dist_checkpointing.optimizer").setLevel(logging.ERROR)
