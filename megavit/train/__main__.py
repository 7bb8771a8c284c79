"""Run one rank: compose the configuration, check it, train (`torchrun -m megavit.train key=value …`)."""

import os
import sys
from pathlib import Path
from typing import IO

from megavit.config.compose import AUTO_MODEL, compose, compose_with_sources
from megavit.config.experiment import ExperimentConfig
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.parallel.layout import rank_from_environment, world_size_from_environment
from megavit.runtime.exit_handler import run_rank
from megavit.runtime.rank_log import RankLog
from megavit.runtime.run_dir import claim_folder
from megavit.runtime.signals import StopRequest
from megavit.runtime.startup import gc_paused, silence_import_warnings


def main(overrides: list[str]) -> int:
    """Train on one rank.

    Args:
        overrides: settings `key=value` of the command line.

    Returns:
        The exit code (see `megavit.runtime.run_dir`).
    """
    config: ExperimentConfig | None = None
    run_dir: Path | None = None
    claim: IO[str] | None = None
    log, stop = RankLog(), StopRequest()
    stop.listen()
    silence_import_warnings()

    def check() -> None:
        nonlocal config, run_dir
        try:
            composition = compose_with_sources(_resolved(overrides))
            config = composition.config
            if rank_from_environment() == 0:
                for note in composition.notes:
                    print(note, flush=True)
        except ConfigError:
            # A setting is wrong. The run's folder may still be known, and exit.json belongs there.
            run_dir = _folder_alone(overrides)
            raise
        run_dir = Path(config.run.dir)
        validate(config, world_size_from_environment())

    def work() -> int:
        nonlocal run_dir, claim
        assert config is not None and run_dir is not None
        rank, world_size = rank_from_environment(), world_size_from_environment()
        try:
            if rank == 0:
                claim = claim_folder(run_dir)
            log.open(run_dir, rank=rank, world_size=world_size)
        except (ConfigError, OSError) as error:
            # This folder is not writable or belongs to another run, so exit.json is not written.
            run_dir = None
            raise error if isinstance(error, ConfigError) else ConfigError(_unwritable(config, error)) from error
        with gc_paused():
            from megavit.train.trainer import Trainer

            trainer = Trainer(config, stop=stop)
        return trainer.run()

    try:
        return run_rank(work, check=check, run_dir=lambda: run_dir, log=log)
    finally:
        if claim is not None:
            claim.close()


def _resolved(overrides: list[str]) -> list[str]:
    """Replace `model=auto` in the settings; only torchrun passes it on, `megavit train` has already replaced it."""
    if AUTO_MODEL not in overrides:
        return overrides
    from megavit.train.auto_model import resolve_auto

    overrides, taken = resolve_auto(overrides)
    if rank_from_environment() == 0:
        print(taken, flush=True)
    return overrides


def _unwritable(config: ExperimentConfig, error: OSError) -> str:
    return f"run.dir={config.run.dir} cannot be written: {error.strerror}; choose another"


def _folder_alone(overrides: list[str]) -> Path | None:
    try:
        return Path(compose([text for text in overrides if text.startswith(("run.dir=", "run.name="))]).run.dir)
    except ConfigError:
        return None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's teardown, in which torch would wait for peers that a failure has ended.
    os._exit(code)
