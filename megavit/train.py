"""What every rank runs: compose the configuration, check it, train. `torchrun -m megavit.train key=value …`."""

import os
import sys
from pathlib import Path

from megavit.compose import compose
from megavit.errors import ConfigError
from megavit.exits import write_exit
from megavit.outcome import quieten_imports, run_as_rank
from megavit.parallel.layout import rank_from_environment, world_size_from_environment
from megavit.signals import StopRequest


def main(overrides: list[str]) -> int:
    """Train as one rank.

    Args:
        overrides: Hydra's `key=value`.

    Returns:
        The exit code (see `megavit.exits`).
    """
    run_dir: Path | None = None
    stop = StopRequest()
    stop.listen()
    quieten_imports()

    def work() -> int:
        nonlocal run_dir
        try:
            config = compose(overrides)
        except ConfigError:
            # Some setting is wrong; where the run's folder is may still be clear, and exit.json belongs there.
            run_dir = _folder_alone(overrides)
            raise
        run_dir = Path(config.run.dir)
        # Before the folder is opened: what one rank refuses all refuse, and the first has left its code there by then.
        config.check(world_size_from_environment())
        if rank_from_environment() == 0:
            try:
                _open_folder(run_dir)
            except ConfigError:
                # There the code cannot be left either.
                run_dir = None
                raise
        from megavit.trainer import Trainer

        return Trainer(config, stop=stop).run()

    return run_as_rank(work, run_dir=lambda: run_dir)


def _open_folder(run_dir: Path) -> None:
    # The last run's code must not stand for this one's.
    try:
        write_exit(run_dir, None, None)
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir} cannot be written: {error.strerror}; choose another") from error


def _folder_alone(overrides: list[str]) -> Path | None:
    try:
        return Path(compose([text for text in overrides if text.startswith(("run.dir=", "run.name="))]).run.dir)
    except ConfigError:
        return None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: torch's would wait for peers that a failure has ended.
    os._exit(code)
