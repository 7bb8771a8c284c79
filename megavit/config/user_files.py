"""Sources of Hydra's search path that read the user's YAML files by `yaml_file.py`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf

from megavit.config.run import default_folder
from megavit.config.search_path import FILE_SCHEME, FOLDER_SCHEME
from megavit.config.yaml_file import UserYaml
from megavit.task.registry import TASKS

_RECIPE = "recipe"
_GLOBAL = "_global_"


@cache
def register_sources() -> None:
    """Make Hydra know the schemes of the user's folders and files, as long as the process lives."""
    for source in (UserFolder, SingleFile):
        Plugins.instance().register(source)


class UserFolder(ConfigSource):
    """A folder with a folder for each group, as megavit's conf/."""

    @staticmethod
    def scheme() -> str:
        return FOLDER_SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        return self._result(self._file(config_path), config_path)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return (Path(self.path) / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = Path(self.path) / config_path
        found: list[str] = []
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        for name in names:
            self._list_add_result(found, str(Path(config_path) / name), name, results_filter)
        return sorted(set(found))

    def _file(self, config_path: str) -> Path:
        return Path(self.path) / self._normalize_file_name(config_path)

    def _result(self, file: Path, config_path: str, *, package: str | None = None) -> ConfigResult:
        """Read a file.

        Args:
            file: the file.
            config_path: its place in the defaults list, such as model/vit_b16.
            package: its package where its header names none; None takes the group, as Hydra does.
        """
        yaml_file = UserYaml(file)
        header = read_header(yaml_file)
        header["package"] = header["package"] or package
        config = yaml_file.config(package=package_of(config_path, header))
        return ConfigResult(provider=self.provider, path=f"{self.scheme()}://{self.path}", config=config, header=header)


class SingleFile(UserFolder):
    """A file that is chosen by its path; other files of its folder are choices of the same group.

    Its path is [group, name of the choice, file] in JSON.
    """

    @staticmethod
    def scheme() -> str:
        return FILE_SCHEME

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._group, self._name, file = json.loads(self.path)
        self._chosen = Path(file)

    def load_config(self, config_path: str) -> ConfigResult:
        package = _GLOBAL if self._group == _RECIPE else None
        result = self._result(self._file(config_path), config_path, package=package)
        if result.header.get("package") == _GLOBAL:
            _choose_task(result.config)
            _let_folder_follow_name(result.config)
        return result

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == self._group

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return [self._name] if config_path == self._group and results_filter in (None, ObjectType.CONFIG) else []

    def _file(self, config_path: str) -> Path:
        group, _, name = config_path.rpartition("/")
        if group != self._group:
            return Path("/nonexistent")
        return self._chosen if name == self._name else self._chosen.with_name(self._normalize_file_name(name))


def read_header(yaml_file: UserYaml) -> dict[str, str | None]:
    """Return Hydra's header of a file, such as {"package": "_global_"}.

    Raises:
        ConfigError: with file and line, for a header that Hydra cannot read.
    """
    try:
        header: dict[str, str | None] = {"package": None, **ConfigSource._get_header_dict(yaml_file.text[:512])}
    except ValueError as error:
        message = f"{error}; a header is a comment such as # @package _global_"
        raise yaml_file.error(message, line=yaml_file.line_of_header()) from error
    return header


def package_of(config_path: str, header: dict[str, str | None]) -> str | None:
    """Return the dotted path that a file's keys are below.

    Args:
        config_path: place in the defaults list, such as model/vit_b16.
        header: of the file.

    Returns:
        "" for an experiment; None where the package is computed.
    """
    group = config_path.rpartition("/")[0].replace("/", ".")
    package = header["package"] or "_group_"
    if package in (_GLOBAL, ""):
        return ""
    if package == "_group_":
        return group
    return None if "_" in package and package.startswith("_") else package


def _let_folder_follow_name(config: Any) -> None:
    """Remove the default folder from a run's own config.yaml, so that run.name=OTHER is a run in another folder."""
    run = config.get("run") if isinstance(config, DictConfig) else None
    if not isinstance(run, DictConfig):
        return
    written: Any = OmegaConf.to_container(run, resolve=False)
    if "name" in written and written.get("dir") == default_folder(str(written["name"])):
        del run["dir"]


def _choose_task(config: Any) -> None:
    """Choose the task that `task.name` names: a run's own config.yaml has no defaults list."""
    name = OmegaConf.select(config, "task.name") if isinstance(config, DictConfig) else None
    if name not in TASKS:
        return
    defaults = config.get("defaults") or []
    if any("task" in str(entry) for entry in defaults):
        return
    config["defaults"] = [{"override /task": name}, *(defaults or ["_self_"])]
