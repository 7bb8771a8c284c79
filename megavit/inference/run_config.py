"""Read the configuration of a trained run, with typed settings on top."""

from dataclasses import replace
from pathlib import Path

from megavit.checkpoint.find import CheckpointRef, resolve_checkpoint
from megavit.config.experiment import ExperimentConfig
from megavit.config.saved import from_yaml, merge
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.inference.trained_run import read_config, refuse_another_network
from megavit.parallel.layout import world_size_from_environment
from megavit.plugins import is_plugin


def prepare(path: str, settings: list[str], *, world_size: int | None = None) -> tuple[ExperimentConfig, CheckpointRef]:
    """Find a run's checkpoint and put typed settings over its configuration, for one rank unless they say otherwise.

    Args:
        path: of `from=`: a run's folder or a checkpoint.
        settings: as typed.
        world_size: number of ranks; None while they are not started.

    Raises:
        ConfigError: if there is no checkpoint, or a setting does not fit.
    """
    weights = resolve_checkpoint(path)
    refuse_untyped_code(weights.checkpoint, settings)
    before = read_config(weights.checkpoint)
    config = merge(before, settings)
    refuse_another_network(weights.checkpoint, before, config)
    if world_size is not None:
        # Training's batch need not fit this world; images per micro batch are as they were, or as typed.
        micro_batch = config.train.micro_batch or min(config.train.global_batch, 64)
        batch = micro_batch * config.parallel.data_parallel_size(world_size) * config.parallel.pp
        config = replace(config, train=replace(config.train, micro_batch=micro_batch, global_batch=batch))
        validate(config, world_size)
    return config, weights


def prepare_on_one_rank(program: str, path: str, settings: list[str]) -> tuple[ExperimentConfig, CheckpointRef]:
    """Do as `prepare` for a command that runs in one process.

    Args:
        program: the command as typed, for messages.
        path: of `from=`.
        settings: as typed.

    Raises:
        ConfigError: also for settings of several ranks, and under a launcher that starts several.
    """
    for setting in settings:
        if setting.startswith(("parallel.", "run.ranks=")):
            raise ConfigError(f"{setting}: {program} runs in one process, which holds all of the model; remove it")
    if world_size_from_environment() > 1:
        raise ConfigError(f"{program} runs in one process; start it once, without torchrun")
    return prepare(path, settings, world_size=1)


def refuse_untyped_code(checkpoint: Path, settings: list[str]) -> None:
    """Refuse to run code that a checkpoint names, which may come from a stranger, unless its name is typed too.

    Raises:
        ConfigError: naming the setting to type.
    """
    config = from_yaml((checkpoint / "run.yaml").read_text())
    for setting, name in (("data.source", config.data.source), ("task.implementation", config.task.implementation)):
        if name is not None and is_plugin(name) and not any(text.startswith(f"{setting}=") for text in settings):
            raise ConfigError(
                f"{checkpoint} was made with {setting}={name}, code from outside megavit; type {setting}={name} too, "
                f"if you trust it, or another {setting}"
            )
