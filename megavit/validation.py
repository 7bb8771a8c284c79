"""Check and parse single values, for the `check` methods of all groups and for commands' arguments."""

import difflib
import math
from collections.abc import Iterable
from enum import Enum
from typing import Any

from megavit.errors import ConfigError

# The value of settings in steps that megavit computes from the number of training images.
AUTO = "auto"


def require_number(
    group: str,
    config: Any,
    *keys: str,
    at_least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
) -> None:
    """Check that settings are finite and in range; null passes.

    Args:
        group: name of the group, for the message.
        config: the group's dataclass.
        keys: names of the fields to check.
        at_least: smallest allowed value.
        above: exclusive lower bound, instead of at_least.
        below: exclusive upper bound.

    Raises:
        ConfigError: if a setting is not finite or out of range; the message names setting, value and range.
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
    """Check that settings are `auto` or a number of steps in range; null passes.

    Args:
        group: name of the group, for the message.
        config: the group's dataclass.
        keys: names of the fields to check.
        at_least: smallest allowed value.

    Raises:
        ConfigError: if a setting is neither; the message names setting, value and allowed values.
    """
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, str):
            if value != AUTO:
                raise ConfigError(f"{group}.{key}={value} must be a number of steps or {AUTO}")
            continue
        require_number(group, config, key, at_least=at_least)


def format_value(value: Any) -> Any:
    """Return a setting's value in the form that a user types: null, true, false or an enum's value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return value.value if isinstance(value, Enum) else value


def parse_int(key: str, text: str, *, at_least: int = 1) -> int:
    """Parse an argument that is a count.

    Args:
        key: name of the argument, for the message.
        text: the argument as typed.
        at_least: smallest allowed value, 0 or more.

    Raises:
        ConfigError: if the text is not an integer, or the number is too small.
    """
    if not text.isdecimal() or int(text) < at_least:
        raise ConfigError(f"{key}={text} must be a whole number of at least {at_least}")
    return int(text)


def parse_ints(key: str, text: str) -> list[int]:
    """Parse counts separated by commas, and drop duplicates.

    Args:
        key: name of the argument, for the message.
        text: the argument as typed.

    Raises:
        ConfigError: if a part is not an integer of at least 1.
    """
    return list(dict.fromkeys(parse_int(key, part) for part in text.split(",")))


def suggest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known word that is most similar to a mistyped one; None if none is similar.

    Args:
        word: the word as typed.
        known: the allowed words.
        cutoff: smallest similarity, in [0, 1]; with 0 every word is similar.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None
