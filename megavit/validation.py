"""Checks of single values, shared by the `check` methods of all groups."""

import difflib
import math
from collections.abc import Iterable
from enum import Enum
from typing import Any

from megavit.errors import ConfigError

# In the place of a number of steps: computed from the number of training images.
AUTO = "auto"


def require_number(
    group: str,
    config: Any,
    *keys: str,
    at_least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
) -> None:
    """Raise for settings that are not finite or out of range; null passes.

    Args:
        group: the group's name, for the message.
        config: its dataclass.
        keys: its fields.
        at_least: smallest allowed value.
        above: exclusive lower bound, instead of at_least.
        below: exclusive upper bound.

    Raises:
        ConfigError: naming the setting, its value and the range.
    """
    for key in keys:
        value = getattr(config, key)
        if value is None:
            continue
        low_enough = value < below
        high_enough = (at_least is None or value >= at_least) and (above is None or value > above)
        if math.isfinite(value) and low_enough and high_enough:
            continue
        low = f"at least {at_least}" if at_least is not None else f"above {above}"
        high = f" and below {below:g}" if below < math.inf else ""
        raise ConfigError(f"{group}.{key}={value} must be a finite number {low}{high}")


def require_steps(group: str, config: Any, *keys: str, at_least: int) -> None:
    """Raise for settings that are neither `auto` nor a number of steps in range; null passes.

    Args:
        group: the group's name, for the message.
        config: its dataclass.
        keys: its fields.
        at_least: smallest allowed value.

    Raises:
        ConfigError: naming the setting, its value and what is allowed.
    """
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, str):
            if value != AUTO:
                raise ConfigError(f"{group}.{key}={value} must be a number of steps or {AUTO}")
            continue
        require_number(group, config, key, at_least=at_least)


def format_value(value: Any) -> Any:
    """Return a setting's value as a user types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return value.value if isinstance(value, Enum) else value


def parse_int(key: str, text: str, *, at_least: int = 1) -> int:
    """Parse an argument that is a count.

    Args:
        key: name of the argument, for the message.
        text: as typed.
        at_least: smallest allowed value, 0 or more.

    Raises:
        ConfigError: if it is not a whole number, or too small.
    """
    if not text.isdecimal() or int(text) < at_least:
        raise ConfigError(f"{key}={text} must be a whole number of at least {at_least}")
    return int(text)


def parse_ints(key: str, text: str) -> list[int]:
    """Parse counts separated by commas; duplicates are dropped.

    Raises:
        ConfigError: if one is not a whole number of at least 1.
    """
    return list(dict.fromkeys(parse_int(key, part) for part in text.split(",")))


def suggest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known word nearest to a mistyped one; None where none is near.

    Args:
        word: as typed.
        known: the words that are allowed.
        cutoff: least similarity, in [0, 1]; 0 takes the nearest at any distance.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None
