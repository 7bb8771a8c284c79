"""Test imports without garbage collection: imported objects are exempt from later collections, new ones are not."""

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


def test_imported_objects_are_never_collected_and_later_objects_are():
    # A separate process, because pytest's own would never collect again.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True"] * 3, "")
