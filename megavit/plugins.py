"""Import plug-ins by name, `package.module:name`, from installed packages or the working folder."""

import importlib
import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from megavit.errors import ConfigError

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_plugin(text: str) -> bool:
    """Return whether a setting names a plug-in and not a part of megavit.

    Args:
        text: the setting's value.
    """
    return ":" in text


def check_name(text: str, setting: str) -> None:
    """Check the name of a plug-in without importing it.

    Args:
        text: `package.module:name`.
        setting: the setting that named it, for the error.

    Raises:
        ConfigError: if the name has another form, belongs to the standard library or is not installed.
    """
    if not _NAME.fullmatch(text):
        raise ConfigError(f"{setting}={text} must be package.module:name, for example my_images.py's my_images:Scans")
    top = text.partition(":")[0].partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        raise ConfigError(
            f"{setting}={text}: {top} is in Python's standard library; name your own package or a file here"
        )
    if not _in_working_folder(top) and top not in packages_distributions():
        raise ConfigError(
            f"{setting}={text}: {top} is neither an installed package nor {top}.py or {top}/ in {Path.cwd()}; install "
            f"it or start from its folder"
        )


def import_plugin(text: str, setting: str) -> Any:
    """Import a plug-in.

    Args:
        text: `package.module:name`.
        setting: the setting that named it, for the error.

    Returns:
        The class or function.

    Raises:
        ConfigError: if the name is not allowed (see `check_name`), or does not exist. Errors of the plug-in propagate.
    """
    check_name(text, setting)
    module_name, _, name = text.partition(":")
    top = module_name.partition(".")[0]
    folder = str(Path.cwd())
    if _in_working_folder(top) and folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{setting}={text}: there is no module {error.name}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{setting}={text}: {module.__file__} has no {name}")
    return getattr(module, name)


def _in_working_folder(top: str) -> bool:
    return PathFinder.find_spec(top, [str(Path.cwd())]) is not None
