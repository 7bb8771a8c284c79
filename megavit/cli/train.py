"""`megavit train key=value …`: check the configuration in this process, then start the ranks."""

import signal
from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import argument
from megavit.cli.config_flags import ConfigFlags, show_configuration
from megavit.errors import ConfigError
from megavit.runtime.run_dir import FINISHED
from megavit.runtime.signals import HELD_BACK
from megavit.train.sweep.options import Pruner, Sampler, SweepOptions


@dataclass(frozen=True)
class TrainArgs(ConfigFlags):
    """The command's own arguments.

    Attributes:
        multirun: train a run for each combination of settings with several values; with --cfg, list the runs.
        sweep_dir: folder of the sweep; without it multirun/NAME.
        parallel: runs of the sweep that train at the same time, each on its share of the GPUs or cores.
        sampler: every combination, or values that Optuna draws.
        trials: runs that Optuna draws.
        sampler_seed: seed of Optuna's draws.
        pruner: whether Optuna stops runs that are worse than the median of the others.
    """

    multirun: bool = argument(False, key="--multirun", short="-m")
    sweep_dir: Path | None = argument(None, key="sweep.dir", form="FOLDER")
    parallel: int = argument(1, key="sweep.parallel", form="N")
    sampler: Sampler = argument(Sampler.grid, key="sweep.sampler")
    trials: int | None = argument(None, key="sweep.trials", form="N")
    sampler_seed: int = argument(0, key="sweep.seed", form="N", at_least=0)
    pruner: Pruner = argument(Pruner.median, key="sweep.pruner")

    def check(self) -> None:
        """Raise ConfigError for arguments that would be ignored."""
        super().check()
        if self.multirun and (self.info is not None or self.resolve or self.package is not None):
            raise ConfigError("--info, --resolve and --package show one run; with --multirun, --cfg lists the runs")
        of_sweep = {"dir": None, "parallel": 1, "sampler": Sampler.grid}
        of_optuna = {"trials": None, "seed": 0, "pruner": Pruner.median}
        given = self.sweep_options()
        ignored = {**of_sweep, **of_optuna} if not self.multirun else of_optuna
        for key, default in ignored.items():
            if getattr(given, key) != default and not (self.multirun and self.sampler is Sampler.optuna):
                without = "sweep.sampler=optuna" if self.multirun else "--multirun"
                raise ConfigError(f"sweep.{key} would be ignored without {without}; add it, or remove sweep.{key}")
        if self.sampler is Sampler.optuna and self.trials is None:
            raise ConfigError("sweep.sampler=optuna needs sweep.trials=N, the number of runs")

    def sweep_options(self) -> SweepOptions:
        """Return how a sweep is run."""
        return SweepOptions(
            dir=self.sweep_dir,
            parallel=self.parallel,
            sampler=self.sampler,
            trials=self.trials,
            seed=self.sampler_seed,
            pruner=self.pruner,
            list_only=self.cfg is not None,
        )


def train(args: TrainArgs, settings: list[str]) -> int:
    """Check the configuration once, then train, on ranks of this machine or in this process.

    Raises:
        ConfigError: if a setting does not fit.
    """
    # Held back until the run listens: a stop requested during the long imports is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)

    if args.multirun:
        from megavit.train.sweep.sweep import run_sweep

        return run_sweep(settings, args.sweep_options())

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
