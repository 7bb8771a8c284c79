"""Write the arguments of a Python call as the overrides of the command line."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

from megavit.config.overrides import write_text
from megavit.config.search_path import groups
from megavit.config.settings import run_types
from megavit.errors import ConfigError
from megavit.validation import format_value

# Settings that name a part of the user's own; from Python the part itself may be passed, also by these keywords.
OBJECT_KEYWORDS = {
    "source": "data.source",
    "transform": "data.transform",
    "task": "task.implementation",
    "optimizer": "optim.name",
}
# Flags of the command line that say where files are.
_FLAGS = {"config_dir": "--config-dir", "config_name": "--config-name"}
_WORD = re.compile(r"[A-Za-z_]\w*")
# What Hydra's grammar reads as something else than a text.
_NO_TEXT = ("null", "true", "false", "nan", "inf")

NameObject = Callable[[str, Any], str]


def importable_only(setting: str, value: Any) -> str:
    """Return the name of a class or function that another process can import.

    Raises:
        ConfigError: if there is no such name.
    """
    from megavit.plugins import name_of

    name = name_of(value)
    if name is None:
        raise ConfigError(
            f"{setting}: {value!r} cannot be imported by another process; define it at the top of a file of the "
            f"working folder or of an installed package, and pass it or its name, package.module:name"
        )
    return name


def to_overrides(
    arguments: Sequence[str | os.PathLike[str]],
    settings: Mapping[str, Any],
    *,
    takes_recipe: bool,
    name_object: NameObject = importable_only,
) -> list[str]:
    """Return the overrides that a Python call stands for, in the order in which they apply.

    Args:
        arguments: `key=value`, as on the command line. Where `takes_recipe`, a first one that is a path, or has
            neither an equals sign nor a sign of Hydra's at its start, is a recipe or its file.
        settings: values by a setting's path, `optim.lr`, by its last word where only one setting has it, or by a group;
            `config_dir` and `config_name` are the flags of the command line.
        takes_recipe: whether a recipe may be given.
        name_object: returns the text that stands for a class or function, given the setting.

    Raises:
        ConfigError: for a word that several settings have, or a value that no setting takes.
    """
    found = []
    for index, argument in enumerate(arguments):
        text = os.fspath(argument)
        is_path = not isinstance(argument, str)
        if is_path or not ("=" in text or text[:1] in ("~", "+", "-")):
            if index or not takes_recipe:
                raise ConfigError(
                    f"'{text}' is no setting: write key=value{', and the recipe first' if takes_recipe else ''}"
                )
            text = write_text("recipe", text)
        found.append(text)
    for key, value in settings.items():
        found += _write_setting(key, value, name_object)
    return found


def _write_setting(key: str, value: Any, name_object: NameObject) -> Iterator[str]:
    if not _is_plain(value):
        path = OBJECT_KEYWORDS.get(key, key)
        if path not in OBJECT_KEYWORDS.values():
            raise ConfigError(
                f"{key} takes a value, not the object {value!r}; objects are taken by {', '.join(OBJECT_KEYWORDS)}"
            )
        yield write_text(path, name_object(path, value))
        return
    if key in _FLAGS:
        yield write_text(_FLAGS[key], os.fspath(value))
        return
    if key == "optimizer":
        key = OBJECT_KEYWORDS[key]
    path = _path_of(key)
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _write_setting(f"{path}.{name}", inner, name_object)
        return
    kind = (list[str] if isinstance(value, list | tuple) else str) if path in groups() else run_types().get(path)
    yield f"{path}={_write(value, _without_none(kind), path)}"


def _path_of(key: str) -> str:
    """Return the path of a setting that is named by its last word; other keys stay, and composing judges them."""
    known = run_types()
    if "." in key or key in known or key in groups():
        return key
    candidates = [path for path in known if path.rpartition(".")[2] == key]
    if len(candidates) > 1:
        raise ConfigError(
            f'{key}= could be {" or ".join(candidates)}; write the path: **{{"{candidates[0]}": …}} or '
            f'"{candidates[0]}=…"'
        )
    return candidates[0] if candidates else key


def _is_plain(value: Any) -> bool:
    kinds = (str, bool, int, float, os.PathLike, Enum, list, tuple, Mapping, NoneType)
    return isinstance(value, kinds) or _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    """Return whether this is a number of NumPy's or torch's."""
    return getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None))


def _write(value: Any, kind: Any, path: str) -> str:
    """Return a value as it is typed for a setting of this type."""
    if _is_scalar(value):
        value = value.item()
    if value is None or isinstance(value, bool):
        return str(format_value(value))
    if isinstance(value, list | tuple):
        inner_kind = get_args(kind)[0] if get_origin(kind) is list else None
        return "[" + ",".join(_write(inner, inner_kind, path) for inner in value) + "]"
    if isinstance(value, Enum):
        value = value.name
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is str:
        return _text(str(value))
    if not isinstance(value, str):
        return repr(value)
    is_word = _WORD.fullmatch(value) and value.lower() not in _NO_TEXT
    text = _text(value)
    return text if is_word or text[0] == '"' else f'"{text}"'


def _text(value: str) -> str:
    return write_text("", value)[1:]


def _without_none(kind: Any) -> Any:
    known = [part for part in get_args(kind) if part is not NoneType]
    return known[0] if NoneType in get_args(kind) and len(known) == 1 else kind
