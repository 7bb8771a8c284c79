"""Match the classes of data with those of a trained classifier, by name and not by position."""

from collections.abc import Sequence

# Names that a message lists; the others are counted.
_NAMED = 5


def are_numbers(classes: Sequence[str]) -> bool:
    """Return whether the names are 0 to n − 1, as in a model that was converted without class names."""
    return list(classes) == [str(number) for number in range(len(classes))]


def find_places(classes: Sequence[str], trained: Sequence[str]) -> list[int] | None:
    """Return the position of each class of the data among the trained classes; None if a name is not among them.

    Args:
        classes: names of the data's classes, in label order.
        trained: names of the classifier's classes, in the order of its scores.
    """
    places = {name: place for place, name in enumerate(trained)}
    return [places[name] for name in classes] if places.keys() >= set(classes) else None


def go_by_number(classes: Sequence[str], trained: Sequence[str]) -> bool:
    """Return whether the data's classes, in order, can be those of a classifier with numbers for class names.

    Both must have the same number of classes. Names that are numbers, such as 007, must increase: folders are sorted as
    text (0, 1, 10, 2).
    """
    numbers = [int(name) for name in classes if name.isdecimal()]
    return len(classes) == len(trained) and not set(classes) & set(trained) and numbers == sorted(numbers)


def describe_change(before: Sequence[str], now: Sequence[str]) -> str:
    """Describe the classes that are new, missing or moved; empty if there are none."""
    former = {name: place for place, name in enumerate(before)}
    current = {name: place for place, name in enumerate(now)}
    stayed = [name for name in before if name in current]
    parts = {
        "new": [name for name in now if name not in former],
        "gone": [name for name in before if name not in current],
        "moved": [f"{name} ({former[name]} → {current[name]})" for name in stayed if former[name] != current[name]],
    }
    return "; ".join(f"{kind}: {some(names)}" for kind, names in parts.items() if names)


def some(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
