"""JSON beside weights: an object whose values are not trusted to have the right type."""

import json
from pathlib import Path
from typing import Any

from megavit.errors import ConfigError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ConfigError: if it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def positive(value: Any, name: str) -> int:
    """A whole number of at least 1.

    Args:
        value: out of a JSON file.
        name: of the file and key, for the error.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    return value


def height_width(value: Any, name: str) -> tuple[int, int]:
    """One side of a square, or [height, width] (see `positive`)."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2:
        raise ConfigError(f"{name}={value!r} must be one side or [height, width]")
    return positive(sides[0], name), positive(sides[1], name)


def square_patch(value: Any, name: str) -> int:
    """The side of a square patch, from one side or [height, width].

    Raises:
        ConfigError: if the patch is not square.
    """
    height, width = height_width(value, name)
    if height != width:
        raise ConfigError(f"{name}={value}: megavit's patches are square")
    return height


def numbers(value: Any, count: int, name: str) -> list[float]:
    """Numbers, one per channel; a single one is every channel's.

    Args:
        value: out of a JSON file.
        count: channels.
        name: of the file and key, for the error.

    Raises:
        ConfigError: if they are no numbers, or of another count.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"{name}={value!r} must be a number, or one per channel")
    if len(values) not in (1, count):
        raise ConfigError(f"{name}={value} has {len(values)} values and the model takes images of {count} channels")
    return [float(one) for one in (values if len(values) == count else values * count)]
