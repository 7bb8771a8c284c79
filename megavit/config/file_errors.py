"""Name the file and the line of the user's that an error of a composition comes from."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from megavit.config.error_text import explain, key_of_error
from megavit.config.overrides import Setting
from megavit.config.search_path import SearchPath, config_dir
from megavit.config.settings import alternatives, nearest
from megavit.config.yaml_file import UserYaml
from megavit.errors import ConfigError


def explain_in_files(
    error: Exception, *, search: SearchPath, overrides: list[str], settings: Sequence[Setting]
) -> ConfigError | None:
    """Return the error with file and line, or None if it does not come from a file of the user's.

    Args:
        error: of Hydra or OmegaConf, or a RecursionError.
        search: the user's folders and files.
        overrides: as Hydra received them.
        settings: the command line.
    """
    if isinstance(error, RecursionError):
        return _explain_cycle(search)
    key = key_of_error(error)
    place = re.match(r"In '([^']+)': (.*)", str(error), re.S)
    if place and key is None:
        return _explain_default(error, place[1], place[2], search, settings)
    if key is None or any(setting.key == key for setting in settings):
        return None
    for file, package in reversed(list(files_used(search, overrides))):
        yaml_file = UserYaml(file)
        line = yaml_file.line_of(key, package=package)
        if line is not None:
            return yaml_file.error(explain(error), line=line)
    return None


def files_used(search: SearchPath, overrides: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the user's files of a composition, in its order, and the packages of their keys."""
    loader = GlobalHydra.instance().config_loader()
    try:
        defaults: Any = loader.compute_defaults_list(search.config_name, overrides, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, RecursionError):
        return
    for default in defaults:
        file = search.file_of(default.config_path or "")
        if file is not None and not _is_ours(file):
            yield file, default.package or ""


def _explain_default(
    error: Exception, config_path: str, text: str, search: SearchPath, settings: Sequence[Setting]
) -> ConfigError | None:
    """Explain an entry of a defaults list that Hydra refuses."""
    words = [word.rpartition("/")[2] for word in re.findall(r"'([^']+)'", text)]
    # Hydra names the file that holds the entry, or, for an override, the file that is overridden.
    chosen = [f"{setting.key}/{name}" for setting in settings for name in _names(setting.value)]
    files = [file for path in (config_path, *chosen) if (file := search.file_of(path)) and not _is_ours(file)]
    yaml_files = [UserYaml(file) for file in files]
    yaml_file = next((each for each in yaml_files if any(each.line_with(word) for word in words)), None)
    if yaml_file is None:
        return None
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file)
        group, _, name = missing.rpartition("/")
        near = nearest(name, search.choices(group)) if group else []
        hint = f"did you mean {alternatives(near)}?" if near else f"no {missing}.yaml in {_folders(search)}"
        return yaml_file.error(f"{missing} does not exist; {hint}", line=yaml_file.line_with(name))
    line = next((found for word in words if (found := yaml_file.line_with(word)) is not None), None)
    return yaml_file.error(text.splitlines()[0], line=line)


def _is_ours(file: Path) -> bool:
    return file.is_relative_to(config_dir())


def _names(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _folders(search: SearchPath) -> str:
    return ", ".join(map(str, search.folders()))


def _explain_cycle(search: SearchPath) -> ConfigError:
    """Explain defaults lists that include each other."""
    folders = [folder for folder in search.folders() if folder != config_dir()]
    in_folders = [path for folder in folders for path in sorted(folder.glob("*/*.yaml"))]
    for path in [*(file.path for file in search.files), *in_folders]:
        cycle = _cycle_from(path, [])
        if cycle:
            yaml_file = UserYaml(path)
            names = " → ".join(each.stem for each in [*cycle, cycle[0]])
            return yaml_file.error(
                f"the defaults lists include each other: {names}; remove one of these entries",
                line=yaml_file.line_with("defaults"),
            )
    return ConfigError("the defaults lists of the configuration include each other; remove one of these entries")


def _cycle_from(path: Path, above: list[Path]) -> list[Path]:
    """Return the files of a cycle of defaults lists that begins with a file; empty if there is none."""
    if above and path == above[0]:
        return above
    if path in above or not path.is_file():
        return []
    for name in _included(path):
        cycle = _cycle_from(path.with_name(f"{name}.yaml"), [*above, path])
        if cycle:
            return cycle
    return []


def _included(path: Path) -> list[str]:
    """Return the names in a defaults list that are files of the same folder."""
    try:
        defaults = UserYaml(path).config(package=None).get("defaults") or []
    except ConfigError:
        # A file of the folder that takes no part.
        return []
    return [entry.rpartition("/")[2].partition("@")[0] for entry in defaults if isinstance(entry, str)]
