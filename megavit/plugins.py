"""Import plug-ins by name, `package.module:name`, from installed packages or the working folder."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from megavit.errors import ConfigError

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# A module of this process alone; it holds the objects that a Python call has passed while the call lasts.
_PASSED = "megavit_passed"


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
    if top == _PASSED:
        if not hasattr(sys.modules.get(_PASSED), text.partition(":")[2]):
            raise ConfigError(
                f"{setting}={text} is an object that a Python call passed, and no other process has it; pass it again "
                f"from Python, or the name of the same part in a file: package.module:name"
            )
        return
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


@contextmanager
def passed_objects() -> Iterator[Callable[[str, Any], str]]:
    """Give a function that returns the name of an object, given the setting that takes it.

    What can be imported has its own name, and another process finds it too. Any other object is put in a module of this
    process, where `import_plugin` finds it until the body ends.
    """
    module = ModuleType(_PASSED, "Objects that a Python call has passed to megavit, while it lasts.")
    sys.modules[_PASSED] = module

    def name_object(setting: str, value: Any) -> str:
        name = name_of(value)
        if name is not None:
            return name
        plain = re.sub(r"\W", "_", getattr(value, "__name__", type(value).__name__)).lstrip("_0123456789") or "object"
        while getattr(module, plain, value) is not value:
            plain += "_"
        setattr(module, plain, value)
        return f"{_PASSED}:{plain}"

    try:
        yield name_object
    finally:
        del sys.modules[_PASSED]


def name_of(value: Any) -> str | None:
    """Return the name by which any process imports a class or function; None if there is none."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or name is None or getattr(sys.modules.get(module), name, None) is not value:
        return None
    try:
        check_name(f"{module}:{name}", "")
    except ConfigError:
        return None
    return f"{module}:{name}"


def is_passed(text: str) -> bool:
    """Return whether a name is that of an object of this process, which no other process has."""
    return text.startswith(f"{_PASSED}:")


def origin(text: str) -> str:
    """Return the file that an imported plug-in came from, or where else it is."""
    module = sys.modules[text.partition(":")[0]]
    return str(getattr(module, "__file__", None) or "an object of this process")


def _in_working_folder(top: str) -> bool:
    return PathFinder.find_spec(top, [str(Path.cwd())]) is not None
