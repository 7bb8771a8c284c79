"""Parse the flags and `key=value` arguments of a command into its dataclass, and describe them for `--help`.

Nothing here imports torch or Hydra: `megavit doctor` parses its arguments where packages may be missing.
"""

import difflib
import math
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from megavit.config.overrides import read_text
from megavit.config.reference import explanations
from megavit.errors import ConfigError
from megavit.validation import format_value, parse_int, parse_ints

T = TypeVar("T")

# Settings of a run that resemble a command's argument.
_SETTINGS_WITHOUT_DOT = ("init_from",)
# Flags that several commands take, and the answer of the others.
_COMPOSING = "only commands that compose a run read it: train, submit, show-data"
_FLAGS_ELSEWHERE = {"--config-dir": _COMPOSING, "-cd": _COMPOSING, "--config-name": _COMPOSING, "-cn": _COMPOSING}
_HYDRAS_FLAGS = {
    "--config-path": "--config-dir DIR adds a folder of configurations",
    "-cp": "--config-dir DIR adds a folder of configurations",
    "--run": "megavit train runs without it",
    "-r": "megavit train runs without it",
    "--hydra-help": "megavit COMMAND --help explains a command and its flags",
    "--experimental-rerun": "megavit train recipe=RUN/config.yaml repeats a run",
    "-sc": "it is --shell-completion install=bash, without a command",
}
_WIDTH = 110


def argument(
    default: Any = MISSING,
    *,
    key: str = "",
    short: str = "",
    form: str = "",
    at_least: int = 1,
    above: float | None = None,
    bare: Any = MISSING,
    is_setting: bool = False,
) -> Any:
    """Declare a field of a command's dataclass; a plain field is one too.

    Args:
        default: value where the argument is not typed; without one it must be typed.
        key: the word before the sign; a field named `from_` has the key `from`. `--word` declares a flag. A flag of
            another type than bool takes a value: `--word VALUE` or `--word=VALUE`.
        short: second spelling of a flag.
        form: placeholder for the usage text, such as FILE.json.
        at_least: smallest value of an integer or a number.
        above: exclusive lower bound of a number, instead of at_least.
        bare: value of a flag that is typed without one; without it a value must follow.
        is_setting: whether a flag is returned with the settings, as `--word=VALUE`, in place of a value of the field.
    """
    metadata = {"key": key, "short": short, "form": form, "at_least": at_least, "above": above, "bare": bare}
    return field(default=default, metadata={**metadata, "is_setting": is_setting})


@dataclass(frozen=True)
class NoArguments:
    """The arguments of a command that takes none."""


@dataclass(frozen=True)
class Argument:
    """One argument of a command.

    Attributes:
        name: the field's name.
        key: the word as typed.
        short: second spelling of a flag.
        kind: its type, without `| None`.
        default: MISSING where the argument is required.
        may_be_null: whether `null` stands for None.
        form: placeholder in the usage text.
        about: the line of the docstring.
        at_least: smallest integer or number.
        above: exclusive lower bound of a number.
        bare: value of a flag that is typed without one; MISSING where a value must follow.
        is_setting: whether a flag is returned with the settings.
    """

    name: str
    key: str
    short: str
    kind: Any
    default: Any
    may_be_null: bool
    form: str
    about: str
    at_least: int
    above: float | None
    bare: Any
    is_setting: bool

    @property
    def is_flag(self) -> bool:
        return self.key.startswith("--")

    @property
    def takes_value(self) -> bool:
        return not self.is_flag or self.kind is not bool

    @property
    def as_typed(self) -> str:
        """The argument as typed: key=FORM, --flag, --flag FORM or --flag [FORM]."""
        if not self.is_flag:
            return f"{self.key}={self.form}"
        if not self.takes_value:
            return self.key
        return f"{self.key} {self.form}" if self.bare is MISSING else f"{self.key} [{self.form}]"

    @property
    def usage(self) -> str:
        if self.is_flag:
            return f"[{self.as_typed}]"
        return f"{self.key}={self.form}" if self.default is MISSING else f"[{self.key}={self.form}]"

    def read(self, text: str) -> Any:
        """Convert the typed text to the field's type, or raise ConfigError."""
        if self.kind in (str, Path):
            return self.kind(text)
        if self.may_be_null and text == "null":
            return None
        if self.kind is int:
            return parse_int(self.key, text, at_least=self.at_least)
        if self.kind is float:
            return self._read_float(text)
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            values = {str(member.value): member for member in self.kind}
            if text not in values:
                raise ConfigError(f"{self.key}={text} must be one of {', '.join(values)}")
            return values[text]
        if get_args(self.kind)[0] is int:
            return tuple(parse_ints(self.key, text))
        return tuple(part.strip() for part in text.removeprefix("[").removesuffix("]").split(","))

    def _read_float(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (value <= self.above if self.above is not None else value < self.at_least):
            bound = f"above {self.above:g}" if self.above is not None else f"of at least {self.at_least}"
            raise ConfigError(f"{self.key}={text} must be a finite number {bound}")
        return value


def parse(
    program: str, kind: type[T], arguments: list[str], *, settings: bool | Collection[str] = False
) -> tuple[T, list[str]]:
    """Split a command line into the command's own arguments and a run's settings.

    Args:
        program: the command as typed, such as `megavit knn`, for messages.
        kind: the dataclass of the command's own arguments. Its method `check()`, if it has one, is called.
        arguments: as typed; text values follow the rules of `megavit.config.overrides.read_text`.
        settings: whether other `key=value` are settings of a run; a collection names those that are.

    Returns:
        The dataclass, and the settings as typed.

    Raises:
        ConfigError: for an unknown key, a repeated or empty argument, a value that does not fit, a missing argument.
    """
    known = {word: own for own in arguments_of(kind) for word in (own.key, own.short) if word}
    values: dict[str, Any] = {}
    rest = []
    words = list(arguments)
    while words:
        typed = words.pop(0)
        key, _, text = typed.partition("=")
        own = known.get(key)
        if own is None:
            _check_setting(program, kind, typed, known, settings)
            rest.append(typed)
            continue
        value = _read_flag(program, own, typed, words) if own.is_flag else text
        if own.is_setting:
            rest.append(f"{own.key}={value}")
        elif not own.takes_value:
            values[own.name] = True
        elif value == "" or own.name in values:
            raise ConfigError(f"{typed}: {program} takes {key}{'' if own.is_flag else '='} once, with a value")
        else:
            values[own.name] = own.read(read_text(value)) if isinstance(value, str) else value
    for own in known.values():
        if own.name not in values and own.default is MISSING:
            raise ConfigError(f"{program} needs {own.key}={own.form}: {usage(program, kind, settings=settings)}")
    args = kind(**values)
    check = getattr(args, "check", None)
    if check is not None:
        check()
    return args, rest


def _read_flag(program: str, own: Argument, typed: str, words: list[str]) -> Any:
    """Return a flag's value as typed, or its value without one; a value in the next word is removed from the words."""
    key, sign, text = typed.partition("=")
    if not own.takes_value:
        if sign:
            raise ConfigError(f"{typed}: {program} takes {key} once, without a value")
        return True
    if sign:
        return text
    if words and not words[0].startswith("-") and (own.bare is MISSING or is_word(words[0])):
        return words.pop(0)
    if own.bare is MISSING:
        raise ConfigError(f"{key} needs a value: {own.as_typed}")
    return own.bare


def is_word(text: str) -> bool:
    """Return whether an argument is the value of a flag before it, rather than a setting or another flag."""
    return "=" not in text and not text.startswith(("-", "+", "~"))


def usage(program: str, kind: type, *, settings: bool | Collection[str] = False) -> str:
    """Return the line that shows how a command is typed."""
    words = [program, *(argument.usage for argument in arguments_of(kind))]
    return " ".join(words + (["[key=value …]"] if settings else []))


def describe(program: str, kind: type, *, about: str, settings: bool | Collection[str] = False) -> str:
    """Return the text of `megavit COMMAND --help`.

    Args:
        program: the command as typed.
        kind: the dataclass of its arguments; the lines under `Attributes:` explain them.
        about: what the command does.
        settings: as for `parse`.
    """
    lines = [usage(program, kind, settings=settings), "", about]
    arguments = arguments_of(kind)
    rows = {f"{a.as_typed}, {a.short}" if a.short else a.as_typed: _about(a) for a in arguments}
    if rows:
        width = min(24, max(map(len, rows))) + 2
        lines += ["", "arguments"]
        for left, right in rows.items():
            first = f"  {left:<{width}}" if len(left) < width - 1 else f"  {left}  "
            lines += textwrap.wrap(right, _WIDTH, initial_indent=first, subsequent_indent=" " * (width + 2))
    if settings is True:
        lines += ["", "key=value: settings of the run, as in megavit train; megavit train --cfg lists them all"]
    elif settings:
        lines += ["", f"key=value: {', '.join(settings)}"]
    return "\n".join(lines)


def _about(argument: Argument) -> str:
    if argument.default in (MISSING, None, False):
        return argument.about
    value = argument.default
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else format_value(value)
    return f"{argument.about} (default {shown})" if shown != "" else argument.about


def _check_setting(
    program: str, kind: type, typed: str, known: dict[str, Argument], settings: bool | Collection[str]
) -> None:
    """Refuse an argument that is neither the command's own nor a setting that it takes."""
    key, sign, _ = typed.partition("=")
    if key.startswith("-"):
        _refuse_flag(program, key, known)
    if settings is True:
        # Settings are checked where the configuration is composed; nearly all of them have a dot.
        is_setting = "." in key or key in _SETTINGS_WITHOUT_DOT or not sign
        near = [] if is_setting else difflib.get_close_matches(key, known, n=1)
        if near:
            raise ConfigError(f"{program} knows no {key}=; did you mean {near[0]}=?")
        return
    allowed = settings or ()
    if key in allowed:
        return
    line = usage(program, kind, settings=settings)
    if not sign:
        raise ConfigError(f"'{typed}' is no setting: {line}")
    near = difflib.get_close_matches(key, [*known, *allowed], n=1, cutoff=0.5)
    raise ConfigError(f"{program} knows no {key}=; {f'did you mean {near[0]}=?' if near else line}")


def _refuse_flag(program: str, key: str, known: dict[str, Argument]) -> None:
    flags = [word for word in known if word.startswith("-")]
    if key in _FLAGS_ELSEWHERE:
        raise ConfigError(f"{key}: {_FLAGS_ELSEWHERE[key]}")
    if key in _HYDRAS_FLAGS:
        raise ConfigError(f"{program} knows no flag {key}: {_HYDRAS_FLAGS[key]}")
    near = difflib.get_close_matches(key, [*flags, "--help"], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"its flags: {', '.join([*flags, '--help'])}"
    raise ConfigError(f"{program} knows no flag {key}; {hint}")


def arguments_of(kind: type) -> list[Argument]:
    """Return the arguments that a command's dataclass declares."""
    hints, about = get_type_hints(kind), explanations(kind)
    found = []
    for part in fields(kind):
        hint, metadata = hints[part.name], part.metadata
        choices = get_args(hint) if get_origin(hint) is not tuple else ()
        may_be_null = NoneType in choices
        bare = next(choice for choice in choices if choice is not NoneType) if may_be_null else hint
        found.append(
            Argument(
                part.name,
                metadata.get("key") or part.name.rstrip("_"),
                metadata.get("short", ""),
                bare,
                part.default,
                may_be_null,
                metadata.get("form") or _form(bare, part.default),
                about.get(part.name, ""),
                metadata.get("at_least", 1),
                metadata.get("above"),
                metadata.get("bare", MISSING),
                metadata.get("is_setting", False),
            )
        )
    return found


def _form(kind: Any, default: Any) -> str:
    """Return the placeholder of an argument without one of its own: its choices, or its default."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    if isinstance(default, tuple) and default:
        return ",".join(map(str, default))
    return "…" if default in (MISSING, None, ()) else str(format_value(default))
