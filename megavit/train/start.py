"""`megavit.train` and `megavit.compose`: compose, check, then train in this process or start the command."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megavit.config.compose import AUTO_MODEL, fix_start_time
from megavit.config.compose import compose as compose_overrides
from megavit.config.experiment import ExperimentConfig
from megavit.config.keywords import NameObject, importable_only, to_overrides
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.plugins import is_passed, passed_objects
from megavit.runtime.command import run_command
from megavit.runtime.startup import import_warnings_silenced
from megavit.runtime.workers import num_ranks
from megavit.train.run import Run

if TYPE_CHECKING:
    from megavit.train.callbacks import Callback

CALLBACKS = "train.callbacks"


def compose(*arguments: str | os.PathLike[str], **settings: Any) -> ExperimentConfig:
    """Compose the configuration of a run, as `megavit train --cfg` shows it.

    Args:
        arguments: first a recipe's name or file, which may be left out; then `key=value`, as on the command line.
        settings: values by a setting's path, by its last word where only one setting has it, or by a group, as for
            `megavit.train`.

    Returns:
        All settings of the run, resolved: `megavit.compose("digits").optim.lr`.

    Raises:
        ConfigError: for an unknown setting or choice, or a value of a wrong type.
    """
    return compose_overrides(_overrides(arguments, settings, importable_only))


def start(
    arguments: Sequence[str | os.PathLike[str]], settings: Mapping[str, Any], *, callbacks: "Sequence[Callback]"
) -> Run:
    """Train; the arguments are those of `megavit.train`."""
    with import_warnings_silenced(), passed_objects() as name_object:
        from megavit.train.session import refuse_launcher, train_here

        refuse_launcher("megavit.train")
        if callbacks:
            settings = {**settings, CALLBACKS: [name_object(CALLBACKS, callback) for callback in callbacks]}
        # A ${now:…} is the same in every process.
        overrides = fix_start_time(_overrides(arguments, settings, name_object))
        config = compose_overrides(overrides)
        ranks = num_ranks(config)
        validate(config, ranks)
        if ranks > 1:
            refuse_passed(config, ranks)
            run_command(["train", *overrides])
        else:
            train_here(config)
    return Run(config.run.dir)


def _overrides(
    arguments: Sequence[str | os.PathLike[str]], settings: Mapping[str, Any], name_object: NameObject
) -> list[str]:
    overrides = to_overrides(arguments, settings, takes_recipe=True, name_object=name_object)
    if AUTO_MODEL in overrides:
        from megavit.train.auto_model import resolve_auto

        overrides, taken = resolve_auto(overrides)
        print(taken)
    return overrides


def refuse_passed(config: ExperimentConfig, ranks: int) -> None:
    """Refuse objects that only this process has, where other processes train."""
    names: dict[str, Sequence[str | None]] = {
        "data.source": [config.data.source],
        "data.transform": [config.data.transform],
        "task.implementation": [config.task.implementation],
        "optim.name": [config.optim.name],
        "train.callbacks": config.train.callbacks or [],
    }
    for setting, found in names.items():
        for name in found:
            if name is not None and is_passed(name):
                raise ConfigError(
                    f"{setting}: {name.partition(':')[2]} is an object of this process, and the {ranks} ranks are "
                    f"other processes; pass the name of a class or function in a file, {setting}=package.module:name, "
                    f"or set run.ranks=1"
                )
