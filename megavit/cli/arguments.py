"""`key=value` arguments of the verbs that open a run instead of composing one."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from megavit.checkpoint.find import CheckpointRef, resolve_checkpoint
from megavit.config.compose import from_yaml, merge
from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import read_text
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.inference.trained_run import read_config, refuse_another_network
from megavit.plugins import is_plugin
from megavit.validation import suggest


def parse_arguments(
    command: str, arguments: list[str], *, needed: Iterable[str], optional: Iterable[str]
) -> dict[str, str]:
    """Split arguments into a dictionary; values are text, as a run's text settings (see `overrides.py`).

    Args:
        command: for the messages.
        arguments: as typed.
        needed: keys that must be there.
        optional: keys that may be.

    Raises:
        ConfigError: for an argument that is no `key=value`, an unknown key, or a missing one.
    """
    needed, known = list(needed), [*needed, *optional]
    usage = " ".join([f"{key}=…" for key in needed] + [f"[{key}=…]" for key in optional])
    args: dict[str, str] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign:
            raise ConfigError(f"'{argument}' is no setting: megavit {command} {usage}")
        if key not in known:
            near = suggest(key, known, cutoff=0.5)
            hint = f"did you mean {near}=?" if near else f"megavit {command} {usage}"
            raise ConfigError(f"megavit {command} knows no {key}=; {hint}")
        args[key] = read_text(value)
    missing = [key for key in needed if not args.get(key)]
    if missing:
        raise ConfigError(f"megavit {command} needs {missing[0]}=: megavit {command} {usage}")
    return args


def split_from(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """`from=RUN` apart from the settings beside it.

    Raises:
        ConfigError: if it is missing.
    """
    args = [argument for argument in arguments if argument.startswith("from=")]
    if len(args) != 1 or args[0] == "from=":
        raise ConfigError(f"megavit {command} needs from=RUN once, then settings as in megavit train: key=value …")
    return read_text(args[0].removeprefix("from=")), [argument for argument in arguments if argument != args[0]]


def split_own(command: str, arguments: list[str], *, known: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """A verb's own arguments apart from `from=RUN` and the settings beside them.

    Args:
        command: for the messages.
        arguments: as typed.
        known: keys that are the verb's own.

    Raises:
        ConfigError: for an own argument that is empty or given twice, or a key that seems to be a mistyped one.
    """
    known, rest = list(known), []
    args: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        # Settings are known further on; nearly all of them have a dot.
        near = None if "." in key or key in ("from", "init_from") else suggest(key, known)
        if key in known:
            if not value or key in args:
                raise ConfigError(f"{argument}: megavit {command} takes {key}= once, with a value")
            args[key] = read_text(value)
        elif near:
            raise ConfigError(f"megavit {command} knows no {key}=; did you mean {near}=?")
        else:
            rest.append(argument)
    return args, rest


def refuse_untyped_code(checkpoint: Path, overrides: list[str]) -> None:
    """A checkpoint may come from a stranger: parts by name that it would have run must be typed once more.

    Raises:
        ConfigError: naming the setting to type.
    """
    config = from_yaml((checkpoint / "run.yaml").read_text())
    for setting, name in (("data.source", config.data.source), ("task.implementation", config.task.implementation)):
        if name is not None and is_plugin(name) and not any(text.startswith(f"{setting}=") for text in overrides):
            raise ConfigError(
                f"{checkpoint} was made with {setting}={name}, code from outside megavit; type {setting}={name} too, "
                f"if you trust it, or another {setting}"
            )


def prepare(
    command: str, arguments: list[str], *, world_size: int | None = None
) -> tuple[ExperimentConfig, CheckpointRef]:
    """What to look at, and how: the run's own configuration with what is typed on top, on one rank unless told.

    Args:
        command: for the messages.
        arguments: `from=RUN` and settings.
        world_size: ranks that take part; None while they are not started.

    Raises:
        ConfigError: if there is no checkpoint, or a setting does not fit.
    """
    place, overrides = split_from(command, arguments)
    weights = resolve_checkpoint(place)
    refuse_untyped_code(weights.checkpoint, overrides)
    before = read_config(weights.checkpoint)
    config = merge(before, overrides)
    refuse_another_network(weights.checkpoint, before, config)
    if world_size is not None:
        # Training's batch need not fit this world; images per micro batch are as they were, or as typed.
        micro_batch = config.train.micro_batch or min(config.train.global_batch, 64)
        batch = micro_batch * config.parallel.data_parallel_size(world_size) * config.parallel.pp
        config = replace(config, train=replace(config.train, micro_batch=micro_batch, global_batch=batch))
        validate(config, world_size)
    return config, weights
