"""What a server of `tests.distributed` imports before it forks ranks; it starts no thread."""

import atexit
import os

os.environ.update(MEGAVIT_DEVICE="cpu", OMP_NUM_THREADS="1")

from megavit.runtime.startup import gc_paused, silence_import_warnings

silence_import_warnings()
with gc_paused():
    import megavit.train.trainer  # noqa: F401

# The server needs nothing of Python's teardown, which takes seconds after these imports.
atexit.register(os._exit, 0)
