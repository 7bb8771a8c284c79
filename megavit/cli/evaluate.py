"""What every rank of `megavit evaluate` runs; the network and all it needs are imported when they may be silent."""

import os
import sys

from megavit.runtime.exit_handler import run_rank
from megavit.runtime.signals import unblock
from megavit.runtime.startup import gc_paused, silence_import_warnings


def main(arguments: list[str]) -> int:
    """Evaluate as one of the ranks that a launcher has started."""
    unblock()
    silence_import_warnings()

    def work() -> int:
        with gc_paused():
            from megavit.cli.arguments import prepare
            from megavit.inference.evaluate import evaluate
            from megavit.parallel.layout import world_size_from_environment

        return evaluate(*prepare("evaluate", arguments, world_size=world_size_from_environment()))

    return run_rank(work, run_dir=lambda: None)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # As in megavit.train.
    os._exit(code)
