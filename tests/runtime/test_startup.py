"""Imports without garbage collection: what they leave is exempt, what comes later is not."""

import subprocess
import sys

PROGRAM = """
import gc
from weakref import ref
from megavit.runtime.startup import gc_paused

class Thing:
    pass

def drop_a_cycle():
    thing = Thing()
    thing.self = thing
    return ref(thing)

try:
    with gc_paused():
        assert not gc.isenabled()
        imported = drop_a_cycle()
        raise KeyError
except KeyError:
    assert gc.isenabled()
later = drop_a_cycle()
gc.collect()
print(imported() is not None, later() is None, gc.get_freeze_count() > 10_000)
"""


def test_what_was_imported_is_not_looked_at_again_and_what_comes_later_is():
    # Its own process: pytest's would keep its garbage for good.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True"] * 3, "")
