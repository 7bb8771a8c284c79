"""Turn an error of Hydra or OmegaConf into one line with the setting, its value and the expected type."""

import re
from collections.abc import Iterable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import Setting
from megavit.errors import ConfigError
from megavit.task.registry import TASKS, config_class, tasks_with


def explain(error: Exception, settings: Iterable[Setting] = ()) -> str:
    """Return setting, value and expected type of an error.

    Args:
        error: of Hydra or OmegaConf.
        settings: as typed.
    """
    cause = root_cause(error)
    text = str(cause)
    other_task = _explain_other_task(text, settings)
    if other_task is not None:
        return other_task
    key, first = key_of_error(error), text.splitlines()[0]
    if added := re.match(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"+{added[1]} adds a setting, and {added[1]} exists; write {added[1]}=VALUE"
    if isinstance(cause, HydraException):
        first = "; ".join(line.strip() for line in text.splitlines()[:2]).replace(".;", ";")
    typed = next((setting.typed for setting in settings if setting.key == key), "")
    # OmegaConf prints 1e3 as 1000.0.
    as_typed = f" ({typed})" if typed and typed.partition("=")[2] not in first else ""
    return f"{key}: {first}{as_typed}" if key else first


def root_cause(error: BaseException) -> BaseException:
    """Return OmegaConf's error, at the bottom of the chain, which names value and type; Hydra's only names the file."""
    while not isinstance(error, OmegaConfBaseException):
        # Where Hydra composes files it raises its own error while it handles OmegaConf's.
        cause = error.__cause__ or error.__context__
        if cause is None:
            return error
        error = cause
    return error


def key_of_error(error: BaseException) -> str | None:
    """Return the dotted path of the setting that an error is about."""
    cause = root_cause(error)
    found = re.search(r"full_key: (\S+)", str(cause)) or re.search(r"full_key: (\S+)", str(error))
    return found[1] if found else getattr(cause, "full_key", None)


def check_task_name(config: ExperimentConfig) -> None:
    """Refuse `task.name=mae` for a group that was chosen by `task=classify`."""
    name = config.task.name
    if config_class(name) is not type(config.task):
        raise ConfigError(f"task.name={name}: choose the task with its settings, by task={name}")


def _explain_other_task(text: str, settings: Iterable[Setting]) -> str | None:
    """Describe a setting that the chosen task does not have and another one has; None for another error.

    Args:
        text: OmegaConf's message.
        settings: as typed.
    """
    found = re.search(r"full_key: task\.(\w+)\s+(?:reference_type=\w+\s+)?object_type=(\w+)", text)
    if not found or "not in" not in text:
        return None
    owners, chosen = tasks_with(found[1]), [name for name, row in TASKS.items() if row.config.__name__ == found[2]]
    if not owners or not chosen:
        return None
    key = f"task.{found[1]}"
    typed = next((setting.typed for setting in settings if setting.key == key), key)
    owned = " and task=".join(owners)
    return f"{typed} would be ignored by task.name={chosen[0]}: it is a setting of task={owned}; remove it"
