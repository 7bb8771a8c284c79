"""Compose the configuration of a run from YAML files and the command line with Hydra."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from megavit.config.error_text import check_task_name, explain
from megavit.config.experiment import ExperimentConfig
from megavit.config.file_errors import explain_in_files, files_used
from megavit.config.overrides import Setting
from megavit.config.parse import AUTO_MODEL, parse_overrides
from megavit.config.search_path import SearchPath, config_dir, group_of, groups, split_search_path
from megavit.config.settings import run_types
from megavit.config.user_files import register_sources
from megavit.errors import ConfigError, printable
from megavit.optim.registry import rule_settings
from megavit.plugins import is_plugin
from megavit.task.config import TaskConfig
from megavit.task.registry import TASKS, TaskRow

# One of each pair is null; to override one clears the other.
_EITHER_OR = (("train.steps", "train.epochs"), ("optim.lr", "optim.base_lr"))


@dataclass(frozen=True)
class Composition:
    """A composed configuration and where it comes from.

    Attributes:
        config: the configuration, resolved.
        node: the same as Hydra composed it, interpolations included, with the node `hydra`.
        search: where choices were looked for.
        files: the user's files that took part.
        notes: what a user should know of his files, a line each.
    """

    config: ExperimentConfig
    node: DictConfig
    search: SearchPath
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def compose(overrides: list[str]) -> ExperimentConfig:
    """Compose the configuration of a run.

    Args:
        overrides: `key=value` as typed (see `overrides.py`), and `--config-dir=DIR`, `--config-name=NAME`.

    Raises:
        ConfigError: for an unknown key or choice (the nearest ones are named), or a value of a wrong type; with file
            and line where it is in a file of the user's.
    """
    return compose_with_sources(overrides).config


def compose_with_sources(overrides: list[str]) -> Composition:
    """Compose the configuration of a run, and tell where it comes from.

    Args:
        overrides: as for `compose`.

    Raises:
        ConfigError: as `compose` does.
    """
    search, rest = split_search_path(overrides)
    search, rest = _name_files(search, rest)
    settings = parse_overrides(rest, search=search)
    typed = _typed_overrides(settings)
    with hydra_initialized(search):
        try:
            node = hydra_compose(search.config_name, overrides=typed, return_hydra_config=True)
            config = _to_config(node, search)
            files = tuple(file for file, _ in files_used(search, typed)) if search.is_users else ()
        except (HydraException, OmegaConfBaseException, RecursionError) as error:
            in_file = explain_in_files(error, search=search, overrides=typed, settings=settings)
            raise in_file or ConfigError(_with_paths(explain(error, settings), search)) from error
    check_task_name(config)
    config.task = config.task.with_sizes(config.model)
    return Composition(config, node, search, files, tuple(_notes(search, node)))


def fix_start_time(overrides: list[str]) -> list[str]:
    """Add the time that ${now:…} stands for, where it is used, so that every process of a run reads the same.

    Args:
        overrides: as for `compose`.
    """
    search, _ = split_search_path(overrides)
    if search.start_time is not None or not (search.is_users or any("${now:" in text for text in overrides)):
        return overrides
    return [*overrides, f"--start-time={datetime.now().isoformat()}"]


@contextmanager
def hydra_initialized(search: SearchPath) -> Iterator[None]:
    """Prepare Hydra for a search path.

    Args:
        search: the user's folders and files.
    """
    register_sources()
    _register(tuple(TASKS.items()))
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        OmegaConf.register_new_resolver("now", _clock(search.start_time), use_cache=True, replace=True)
        loader = GlobalHydra.instance().config_loader()
        path = loader.get_search_path()
        for provider, source in search.sources_before():
            path.prepend(provider, source, anchor="main")
        for provider, source in search.sources_after():
            path.prepend(provider, source, anchor="schema")
        loader.repository.initialize_sources(path)
        yield


def _clock(start_time: str | None) -> Any:
    def now(pattern: str) -> str:
        if start_time is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"${{now:{pattern}}} differs between ranks that torchrun starts; type --start-time=$(date -Is), or "
                f"start with megavit train"
            )
        try:
            time = datetime.now() if start_time is None else datetime.fromisoformat(start_time)
        except ValueError:
            raise ValueError(f"--start-time={start_time} must be a time such as 2026-01-31T12:00:00") from None
        return time.strftime(pattern)

    return now


def _name_files(search: SearchPath, overrides: list[str]) -> tuple[SearchPath, list[str]]:
    """Replace the files in choices such as recipe=FILE.yaml by their names in the search path."""
    named = []
    for text in overrides:
        key, sign, value = text.partition("=")
        group = group_of(text)
        if group is not None and sign and (".yaml" in value or ".yml" in value):
            search, value = search.with_files(group, value)
        named.append(f"{key}{sign}{value}")
    return search, named


def _typed_overrides(settings: Sequence[Setting]) -> list[str]:
    """Return the overrides for Hydra: as typed, and what follows from them."""
    typed = {setting.key for setting in settings}
    cleared = [
        f"{loser}=null"
        for pair in _EITHER_OR
        for winner, loser in (pair, pair[::-1])
        if winner in typed and loser not in typed
    ]
    if any(setting.key == "optim.name" and is_plugin(str(setting.value)) for setting in settings):
        # What the chosen group and recipe set is for an optimizer of megavit's.
        cleared += [f"optim.{key}=null" for key in sorted(rule_settings()) if f"optim.{key}" not in typed]
    # Hydra deletes a group's choice with a tilde; users type null.
    overrides = ["~recipe" if setting.hydra == "recipe=null" else setting.hydra for setting in settings]
    if "recipe" not in typed and any(_is_other_data(setting) for setting in settings):
        overrides.append("~recipe")
        if "data" not in typed:
            # Otherwise the channel, mean and std of the digits would remain.
            overrides.append("data=folder")
    if "optim.warmup_steps" in typed and "optim.shorten_warmup" not in typed:
        overrides.append("optim.shorten_warmup=false")
    return [*overrides, *cleared]


def _is_other_data(setting: Setting) -> bool:
    """Return whether a setting chooses other data than the default recipe, the digits."""
    return setting.key in ("data", "data.path") and setting.value not in ("digits", None)


def _to_config(node: DictConfig, search: SearchPath) -> ExperimentConfig:
    resolved = copy.deepcopy(node)
    with open_dict(resolved):
        del resolved["hydra"]
    _resolve(resolved)
    config = OmegaConf.to_object(resolved)
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(
            f"--config-name={search.config_name}: its defaults list must begin with train, which has all settings"
        )
    return config


def _resolve(node: DictConfig) -> None:
    """Replace interpolations by their values; an error names the setting, which OmegaConf's does not."""
    try:
        OmegaConf.resolve(node)
    except OmegaConfBaseException as error:
        for key in run_types():
            try:
                OmegaConf.select(node, key)
            except OmegaConfBaseException as of_key:
                of_key.full_key = key
                raise of_key from error
        raise


@cache
def _register(tasks: tuple[tuple[str, TaskRow], ...]) -> None:
    """Store the types of all settings in Hydra, as long as the process lives; a task's YAML adds its own settings."""
    store = ConfigStore.instance()
    store.store(name="run_config", node=ExperimentConfig(task=TaskConfig()))
    for name, row in tasks:
        store.store(group="task", name=f"{name}_settings", node=row.config)


def _with_paths(message: str, search: SearchPath) -> str:
    """Write the paths of files that are chosen by them in place of their names in the search path."""
    for file in search.files:
        message = message.replace(f"{file.group}/{file.name}", printable(str(file.path)))
    return message


def _notes(search: SearchPath, node: DictConfig) -> Iterator[str]:
    """Say which conf/ was found, and which of two files with the name of a choice is used."""
    if search.found is not None:
        choices = {group: [path.stem for path in sorted((search.found / group).glob("*.yaml"))] for group in groups()}
        words = [f"{group}={'|'.join(names)}" for group, names in choices.items() if names]
        if words:
            yield f"choices found in {printable(str(search.found))}: {', '.join(words)}"
    for group, choice in node.hydra.runtime.choices.items():
        for name in [choice] if isinstance(choice, str) else list(choice or []):
            yield from _shadowed(search, f"{group}/{name}", f"{group}={name}")
    yield from _shadowed(search, search.config_name, search.config_name)


def _shadowed(search: SearchPath, config_path: str, typed: str) -> Iterator[str]:
    candidates = [folder / f"{config_path}.yaml" for folder in search.folders()]
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        used, *others = [printable(str(path)) for path in found]
        yield f"{typed} is {used}; {', '.join(others)} is not used"


__all__ = ["AUTO_MODEL", "Composition", "compose", "compose_with_sources", "fix_start_time", "hydra_initialized"]
