"""Read and write the configuration of a run as YAML, and put settings over it."""

from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavit.config.error_text import check_task_name, explain
from megavit.config.experiment import ExperimentConfig
from megavit.config.parse import parse_overrides
from megavit.config.search_path import groups
from megavit.config.settings import REMOVED, RENAMED
from megavit.errors import ConfigError
from megavit.task.config import ClassificationConfig, TaskConfig
from megavit.task.registry import config_class


def to_yaml(config: ExperimentConfig) -> str:
    """Return the resolved configuration as YAML, as saved in the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> ExperimentConfig:
    """Read a configuration that `to_yaml` wrote.

    Raises:
        ConfigError: if it does not fit this version's settings.
    """
    if "${" in text:
        raise ConfigError(
            "a run's configuration holds ${…}, which is resolved before it is written; it was tampered with"
        )
    try:
        saved = OmegaConf.create(text)
        if isinstance(saved, DictConfig):
            _rename(saved)
        default = ExperimentConfig(task=_read_task(saved))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), saved))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"a run's configuration cannot be read: {explain(error)}") from error
    assert isinstance(config, ExperimentConfig)
    return config


def _rename(saved: DictConfig) -> None:
    """Give old settings their new names, and drop those that no longer exist."""
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        if isinstance(saved.get(group), DictConfig) and name in saved[group]:
            saved[group][new.partition(".")[2]] = saved[group].pop(name)
    for removed in REMOVED:
        group, _, name = removed.rpartition(".")
        of = saved.get(group) if group else saved
        if isinstance(of, DictConfig):
            of.pop(name, None)


def _read_task(saved: Any) -> TaskConfig:
    """Return the default settings of the task that a saved configuration names.

    Earlier runs have the settings of all tasks, null where they are another task's; here these are removed.
    """
    task = saved.get("task") if isinstance(saved, DictConfig) else None
    if not isinstance(task, DictConfig):
        return ClassificationConfig()
    default = config_class(task.get("name", ClassificationConfig.name))()
    for setting in [setting for setting in task if task[setting] is None]:
        del task[setting]
    return default


def merge(config: ExperimentConfig, overrides: list[str]) -> ExperimentConfig:
    """Override settings of a saved configuration.

    Args:
        config: the saved configuration.
        overrides: `key=value`, as typed; the choice of a group cannot change.

    Raises:
        ConfigError: for an unknown key, or a value of a wrong type.
    """
    for text in overrides:
        if text.startswith(("--config-dir=", "--config-name=", "hydra.searchpath=")):
            raise ConfigError(f"{text}: the configuration is that of a run, which needs no other files; remove it")
    settings = parse_overrides(overrides)
    for setting in settings:
        if setting.override.is_delete() or setting.override.is_add() or setting.override.is_force_add():
            raise ConfigError(f"{setting.typed}: a run has all settings; write {setting.key}=VALUE")
        if setting.key in groups():
            hint = f", data.source={setting.value} for example" if setting.key == "data" else ""
            raise ConfigError(f"{setting.typed}: a run's groups are as they were; set single keys of them{hint}")
    try:
        typed = OmegaConf.create({})
        for setting in settings:
            OmegaConf.update(typed, setting.key, setting.value)
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), typed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, settings)) from error
    assert isinstance(merged, ExperimentConfig)
    check_task_name(merged)
    return merged
