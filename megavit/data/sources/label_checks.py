"""Warn of unusual classes: classes without images, names that differ only in case."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megavit.data.sources.base import Source

# Names that a line lists; the others are counted.
_NAMED = 5

_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")


def describe_oddities(sources: Mapping[str, Source]) -> Iterator[str]:
    """Return warnings about the classes.

    Args:
        sources: the data of `train` and, if there are any, of `val`. Only those with a method `label_counts` are
            checked for classes without images: reading each label may take long.
    """
    names = sources["train"].classes
    yield from _describe_likenesses(names)
    empty = {split: _empty_classes(source) for split, source in sources.items()}
    if empty["train"]:
        yield (
            f"warning: {_some(empty['train'], names)} no training images{_explain_numbers(names)}; the classifier has "
            f"scores for them"
        )
    unmeasured = [name for name in empty.get("val", []) if name not in set(empty["train"])]
    if unmeasured:
        yield (
            f"warning: {_some(unmeasured, names)} no validation images: validation does not measure them; labels are "
            f"those of training"
        )


def _empty_classes(source: Source) -> list[str]:
    count = getattr(source, "label_counts", None)
    return [] if count is None else [source.classes[label] for label in np.flatnonzero(count() == 0)]


def _describe_likenesses(names: Sequence[str]) -> Iterator[str]:
    similar = defaultdict(list)
    for name in names:
        similar[_LEADING_ZEROS.sub("", " ".join(name.split()).casefold())].append(name)
    groups = [" and ".join(map(repr, group)) for group in similar.values() if len(group) > 1]
    if groups:
        yield (
            f"warning: classes whose names differ only in blanks, case or leading zeros: {_list(groups)}; give them "
            f"one name if they are one class"
        )


def _explain_numbers(names: Sequence[str]) -> str:
    if not all(name.isdecimal() for name in names):
        return ""
    return f": labels are numbers, and each from 0 to {names[-1]} is a class"


def _some(empty: Sequence[str], names: Sequence[str]) -> str:
    few = "has" if len(empty) == 1 else "have"
    return f"{len(empty):,} of {len(names):,} classes, {_list(empty)}, {few}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
