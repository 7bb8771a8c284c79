"""Parse `key=value`: a text setting takes the text after the equals sign, every other setting Hydra's grammar.

The value of a text setting (`str`, `str | None`, and the items of `list[str]` and `dict[str, str]`) is never parsed as
a number, a boolean, a function or a sweep. Four forms are special:

* null, where the setting may be null;
* quotes around the whole value, as Hydra reads them: the text between them is literal, null and ~ included;
* ~ at the beginning, also after a prefix such as ema:, is the home directory, as in a shell;
* ${run.name} is the value of another setting, as everywhere in a configuration.

Items of a list, [a,b c,"d,e"], are separated by commas; blanks around them are dropped.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from megavit.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# As in Hydra's grammar: an even number of backslashes precedes a closing quote.
_QUOTED = r'"(?:\\.|[^"\\])*"|' + r"'(?:\\.|[^'\\])*'"
_TEXT = re.compile(rf"\s*({_QUOTED}|[^,]*?)\s*(?:,|\Z)", re.S)
_LIST = re.compile(rf"\s*(\[(?:{_QUOTED}|[^\"'])*?\]|[^,]*?)\s*(?:,|\Z)", re.S)
_HOME = re.compile(r"(\w+:)?(~.*)", re.S)
# Settings of [height, width]; one number sets both.
_SIDES = ("data.image_size",)


@dataclass(frozen=True)
class Setting:
    """A parsed `key=value`.

    Attributes:
        typed: the argument as typed.
        hydra: the same in Hydra's grammar.
        override: Hydra's parsed override.
    """

    typed: str
    hydra: str
    override: "Override"

    @property
    def key(self) -> str:
        """The dotted path, or the group."""
        return self.override.key_or_group

    @property
    def value(self) -> Any:
        """Its value."""
        return self.override.value()


def types_of(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting by its dotted path.

    Args:
        config_class: a dataclass of settings and of groups, which are dataclasses too.
        prefix: prefix of the paths, such as `cluster.`.
    """
    found: dict[str, Any] = {}
    hints = get_type_hints(config_class)
    for part in fields(config_class):
        path, kind = f"{prefix}{part.name}", hints[part.name]
        found |= types_of(kind, f"{path}.") if isinstance(kind, type) and is_dataclass(kind) else {path: kind}
    return found


def key_of(typed: str) -> str:
    """Return the key of an argument, without Hydra's signs + and ~."""
    return typed.partition("=")[0].lstrip("+~").partition("@")[0]


def read_setting(typed: str, types: Mapping[str, Any]) -> Setting:
    """Parse an argument; the caller handles sweeps.

    Args:
        typed: `key=value`.
        types: types of the settings by path; the value of any other key follows Hydra's grammar.

    Raises:
        ConfigError: if it cannot be parsed.
    """
    # Not at the top: megavit doctor reads its own arguments where packages may be missing.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "\x85" in typed:
        raise ConfigError(f"{typed!r} holds U+0085, a line break that the run's config.yaml would not keep")
    key, sign, value = typed.partition("=")
    kind = _type_of(key.lstrip("+"), types)
    hydra = f"{key}={_in_hydras_grammar(value, kind, typed)}" if sign and kind is not None else typed
    try:
        override = OverridesParser.create().parse_override(hydra)
    except HydraException as error:
        raise ConfigError(f"'{typed}' cannot be read: {str(error).splitlines()[0]}") from error
    return Setting(typed, hydra, override)


def read_text(value: str) -> str:
    """Return the text of a value: without Hydra's quotes, or with ~ replaced by the home directory."""
    if re.fullmatch(_QUOTED, value, re.S):
        # Backslashes are special only before a quote, the closing one included.
        return re.sub(rf"(\\+)({value[0]}|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2], value[1:-1])
    home = _HOME.fullmatch(value)
    return f"{home[1] or ''}{os.path.expanduser(home[2])}" if home else value


def write_text(key: str, text: str) -> str:
    """Return the argument that sets a text setting to this text, quoted unless it is only letters, digits and ./-."""
    is_plain = re.fullmatch(r"[\w./-]+", text) and text.lower() != "null"
    return f"{key}={text if is_plain else _quote(text)}"


def write_home_out(typed: str, types: Mapping[str, Any]) -> str:
    """Replace ~ in an argument by the home directory, for a process that may have another one."""
    key, sign, value = typed.partition("=")
    if not sign or not value or value[0] in "\"'" or _bare(_type_of(key.lstrip("+"), types)) is not str:
        return typed
    text = read_text(value)
    return typed if text == value else write_text(key, text)


def split_text_values(typed: str, types: Mapping[str, Any]) -> list[str] | None:
    """Return `key=value` for each value of a text setting, a,b or choice(a,b); None for a setting of another type.

    Raises:
        ConfigError: if it cannot be parsed.
    """
    key, sign, value = typed.partition("=")
    bare = _bare(_type_of(key.lstrip("+"), types))
    if not sign or bare not in (str, list[str]):
        return None
    choice = re.fullmatch(r"choice\((.*)\)", value, re.S)
    values = list(_split(choice[1] if choice else value, _LIST if bare == list[str] else _TEXT))
    if len(values) < 2 and not choice:
        return [typed]
    if not choice and (function := re.match(r"(range|interval|glob|shuffle|sort|tag)\(", value)):
        raise ConfigError(
            f"'{typed}': a text setting takes a,b or choice(a,b), and not {function[1]}(); a text with a comma goes in "
            f"quotes"
        )
    if "" in values:
        raise ConfigError(f"'{typed}' gives an empty value between two commas; an empty text goes in quotes")
    return [f"{key}={each}" for each in values]


def list_items(value: str) -> list[str]:
    """Return the texts of a list as typed: [a,"b c"].

    Raises:
        ConfigError: if it is no list.
    """
    return list(_items(value, value))


def write_setting(key: str, value: Any) -> str:
    """Return the argument that sets a setting to a value.

    Args:
        key: dotted path.
        value: None, a bool, a number, a text, a member of an Enum, or a list or dictionary of these.
    """
    return (
        write_text(key, value) if isinstance(value, str) and not isinstance(value, Enum) else f"{key}={_write(value)}"
    )


def _write(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str | PurePath):
        return _quote(str(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_write(each)}" for name, each in value.items()) + "}"
    if isinstance(value, Sequence):
        return f"[{','.join(map(_write, value))}]"
    return repr(value)


def _type_of(key: str, types: Mapping[str, Any]) -> Any:
    """Return a setting's type, for a key of a dictionary that of its values; None for an unknown key."""
    if key in types:
        return types[key]
    for path, kind in types.items():
        if get_origin(_bare(kind)) is dict and key.startswith(f"{path}."):
            return get_args(_bare(kind))[1]
    return None


def _bare(kind: Any) -> Any:
    """Return a type without its None."""
    known = [part for part in get_args(kind) if part is not NoneType]
    return known[0] if NoneType in get_args(kind) and len(known) == 1 else kind


def _in_hydras_grammar(value: str, kind: Any, typed: str) -> str:
    bare, may_be_null = _bare(kind), NoneType in get_args(kind)
    if bare is str:
        if value.lower() != "null":
            return _quote(read_text(value))
        if may_be_null:
            return value
        raise ConfigError(
            f"{typed}: this setting is never null; the word itself goes in quotes: {typed[:-4]}'\"null\"'"
        )
    if key_of(typed) in _SIDES and re.fullmatch(r"\d+", value):
        return f"[{value},{value}]"
    if bare == list[str] and not (may_be_null and value.lower() == "null"):
        return f"[{','.join(_quote(text) for text in _items(value, typed))}]"
    if get_origin(bare) is dict:
        pairs = (text.partition(":") for text in _inside(value, "{}", typed))
        return "{" + ",".join(f"{name.strip()}:{_pair_value(text.strip())}" for name, _, text in pairs) + "}"
    return value


def _pair_value(value: str) -> str:
    return value if value.lower() == "null" else _quote(read_text(value))


def _items(value: str, typed: str) -> Iterator[str]:
    for item in _inside(value, "[]", typed):
        is_quoted = item[0] in "\"'" and read_text(item) != item
        if not is_quoted and not _brackets_pair_up(item):
            raise ConfigError(f"'{typed}' cannot be read: an item with a bracket of its own goes in quotes, [\"a[b\"]")
        yield read_text(item) if is_quoted else item


def _inside(value: str, brackets: str, typed: str) -> list[str]:
    """Return the items between two brackets."""
    if not (value[:1] == brackets[0] and value[-1:] == brackets[1] and len(value) > 1):
        key = key_of(typed)
        raise ConfigError(f"'{typed}' is no list: it goes in brackets, {key}={brackets[0]}{value}{brackets[1]}")
    inside = value[1:-1]
    found = list(_split(inside, _TEXT)) if inside.strip() else []
    if "" in found:
        raise ConfigError(f"'{typed}' holds an empty item; an empty text goes in quotes")
    return found


def _split(text: str, item: re.Pattern[str]) -> Iterator[str]:
    at = 0
    while True:
        match = item.match(text, at)
        assert match is not None
        yield match[1]
        at = match.end()
        if not match[0].endswith(",") or match.start() == match.end():
            return


def _brackets_pair_up(text: str) -> bool:
    depth = 0
    for sign in re.findall(r"[\[\]]", text):
        depth += 1 if sign == "[" else -1
        if depth < 0:
            return False
    return depth == 0


def _quote(text: str) -> str:
    inside = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'"{inside}"'
