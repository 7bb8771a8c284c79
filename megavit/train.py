"""What every rank runs: compose the configuration, check it, train. `torchrun -m megavit.train key=value …`."""

import logging
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
    _quieten_imports()

    def work() -> int:
        nonlocal run_dir
        config = compose(overrides)
        run_dir = Path(config.run.dir)
        config.check(world_size_from_environment())
        from megavit.trainer import Trainer

        return Trainer(config).run()

    return run_as_rank(work, run_dir=lambda: run_dir)


def _quieten_imports() -> None:
    # Each rank would say of every optional package, and of CUDA, that it is not there.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: torch's would wait for peers that a failure has ended.
    os._exit(code)
