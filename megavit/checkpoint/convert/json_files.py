"""Read the JSON files that accompany weights, and check the types of their values."""

import json
from pathlib import Path
from typing import Any

from megavit.errors import ConfigError


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: if the file cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def positive(value: Any, name: str) -> int:
    """Check that a value is an integer of at least 1.

    Args:
        value: value from a JSON file.
        name: file and key, for the error.

    Raises:
        ConfigError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    return value


def height_width(value: Any, name: str) -> tuple[int, int]:
    """Return [height, width], from one side of a square or both (see `positive`)."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2:
        raise ConfigError(f"{name}={value!r} must be one side or [height, width]")
    return positive(sides[0], name), positive(sides[1], name)


def square_patch(value: Any, name: str) -> int:
    """Return the side of a square patch, from one side or [height, width].

    Raises:
        ConfigError: if the patch is not square.
    """
    height, width = height_width(value, name)
    if height != width:
        raise ConfigError(f"{name}={value}: megavit's patches are square")
    return height


def numbers(value: Any, count: int, name: str) -> list[float]:
    """Return one number per channel; a single number is repeated.

    Args:
        value: value from a JSON file.
        count: number of channels.
        name: file and key, for the error.

    Raises:
        ConfigError: if they are not numbers, or their count is wrong.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"{name}={value!r} must be a number, or one per channel")
    if len(values) not in (1, count):
        raise ConfigError(f"{name}={value} has {len(values)} values and the model takes images of {count} channels")
    return [float(one) for one in (values if len(values) == count else values * count)]
