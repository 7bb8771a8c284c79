"""What every rank runs: compose the configuration, check it, train. `torchrun -m megavit.train key=value …`."""

import os
import sys
import warnings
from pathlib import Path

from megavit.compose import compose
from megavit.outcome import run_as_rank
from megavit.parallel.layout import world_size_from_environment


def main(overrides: list[str]) -> int:
    """Train as one rank.

    Args:
        overrides: Hydra's `key=value`.

    Returns:
        The exit code (see `megavit.outcome`).
    """
    run_dir: Path | None = None
    # Megatron-Core warns at import of every optional package that is not there, on every rank.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")

    def work() -> int:
        nonlocal run_dir
        config = compose(overrides)
        config.check(world_size_from_environment())
        run_dir = Path(config.run.dir)
        from megavit.trainer import Trainer

        return Trainer(config).run()

    return run_as_rank(work, run_dir=lambda: run_dir)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: torch's would wait for peers that a failure has ended.
    os._exit(code)
