"""What every rank of `megavit evaluate` runs; the network and all it needs are imported when they may be silent."""

import os
import sys

from megavit.importing import quieten_imports, uncollected
from megavit.outcome import run_as_rank
from megavit.signals import let_through


def main(arguments: list[str]) -> int:
    """Evaluate as one of the ranks that a launcher has started."""
    let_through()
    quieten_imports()

    def work() -> int:
        with uncollected():
            from megavit.evaluate import evaluate

        return evaluate(arguments)

    return run_as_rank(work, run_dir=lambda: None)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # As in megavit.train.
    os._exit(code)
