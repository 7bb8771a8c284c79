"""Describe settings in words: meaning, type and values, from the dataclasses and their docstrings.

It imports the standard library alone, for `megavit COMMAND --help` and completion in a shell.
"""

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


def explanations(kind: type) -> dict[str, str]:
    """Return the text of each field of a dataclass, from its docstring and those of the classes that it extends.

    Args:
        kind: the dataclass; the section `Attributes:` of its docstring has an item for each field.
    """
    found: dict[str, str] = {}
    for each in reversed(inspect.getmro(kind)):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in section.splitlines():
            start = re.match(r" {4}(\w+): (.*)", line)
            if start:
                name = start[1]
                found[name] = start[2]
            elif line and not line.startswith(" "):
                break
            elif name and line.strip():
                found[name] += f" {line.strip()}"
    return found


def type_in_words(kind: Any, *, quote: str = "") -> str:
    """Return a type in words; of an enum, its values.

    Args:
        kind: the type of a setting.
        quote: what encloses each value of an enum, such as Markdown's backtick.
    """
    if kind is NoneType:
        return "null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"{quote}{member.value}{quote}" for member in kind)
    args = get_args(kind)
    if get_origin(kind) in (list, tuple):
        return f"list of {type_in_words(args[0], quote=quote)}"
    if get_origin(kind) is dict:
        return f"map of {type_in_words(args[0], quote=quote)} to {type_in_words(args[1], quote=quote)}"
    if bool in args:
        return "true, false or null"
    if args:
        return " or ".join(type_in_words(part, quote=quote) for part in args)
    return _NAMES[kind]


def enum_text(kind: Any) -> str:
    """Return what the docstring of an enum says of its values, from the first one on that it names in backticks."""
    for part in (kind, *get_args(kind)):
        if isinstance(part, type) and issubclass(part, Enum):
            text = " ".join(inspect.cleandoc(part.__doc__ or "").split())
            found = [at for member in part if (at := text.find(f"`{member.value}`")) >= 0]
            return text[min(found) :] if found else ""
    return ""


def values_of(kind: Any) -> list[str]:
    """Return the values that a setting takes, as typed; none for a number or a text."""
    return list(_values(kind))


def _values(kind: Any) -> Iterator[str]:
    for part in get_args(kind) or (kind,):
        if part is NoneType:
            yield "null"
        elif part is bool:
            yield from ("true", "false")
        elif isinstance(part, type) and issubclass(part, Enum):
            yield from (str(member.value) for member in part)


def header_lines(path: Path) -> list[str]:
    """Return the lines of the comment that a YAML file opens with, without Hydra's package line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return lines


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that a YAML file opens with, without a recipe's command."""
    text = " ".join(line for line in header_lines(path) if not line.startswith("megavit "))
    sentence, stop, _ = text.strip().partition(". ")
    return sentence + stop.strip()
