"""`megavit train key=value …`: check the configuration in this process, then start the ranks."""

import signal
from dataclasses import dataclass
from pathlib import Path

from megavit.cli.config_flags import ConfigFlags, show_configuration
from megavit.runtime.run_dir import FINISHED
from megavit.runtime.signals import HELD_BACK


@dataclass(frozen=True)
class TrainArgs(ConfigFlags):
    """The command's own arguments."""


def train(args: TrainArgs, settings: list[str]) -> int:
    """Check the configuration once, then train, on ranks of this machine or in this process.

    Raises:
        ConfigError: if a setting does not fit.
    """
    # Held back until the run listens: a stop requested during the long imports is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)

    from megavit.config.compose import AUTO_MODEL, compose, fix_start_time
    from megavit.config.validate import validate
    from megavit.runtime.workers import num_ranks, start_ranks

    if AUTO_MODEL in settings:
        from megavit.train.auto_model import resolve_auto

        settings, taken = resolve_auto(settings)
        print(f"# {taken}" if args.only_shows else taken, flush=True)
    settings = fix_start_time(settings)
    if args.only_shows:
        show_configuration(args, settings)
        return FINISHED
    config = compose(settings)
    ranks = num_ranks(config)
    validate(config, ranks)
    if ranks > 1:
        return start_ranks(settings, ranks=ranks, run_dir=Path(config.run.dir))
    from megavit.train.__main__ import main as train_as_rank

    return train_as_rank(settings)
