"""A training and a validation part: told by the files' names, or, where data come as one, of each class a share."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from megavit.data.sources import remote
from megavit.errors import ConfigError

# The words for splits, in any case. Test data validate where nothing else does.
_TRAINING, _VALIDATION, _TEST = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "dev"),
    ("test", "testing"),
)
SPLIT_WORDS = (*_TRAINING, *_VALIDATION, *_TEST)
_WORD = re.compile(r"[^\W\d_]+")

_SPLIT_SEED = 0


def find_splits(names: Iterable[str]) -> dict[str, str] | None:
    """Which of some names, of folders or of a dataset's splits, are that of the training and of the validation split.

    Returns:
        The names of `train` and `val`; None where one is missing, or several could be it.
    """
    every = set(names)
    if {"train", "val"} <= every:
        return {"train": "train", "val": "val"}
    training, *validation = (
        [name for name in every if name.lower() in words] for words in (_TRAINING, _VALIDATION, _TEST)
    )
    found = next(filter(None, validation), [])
    return {"train": training[0], "val": found[0]} if len(training) == len(found) == 1 else None


def parts_by_name(names: Iterable[str]) -> dict[str, list[str]] | None:
    """Files with the word train or training in their names train; those with val, valid, … else test validate.

    A word is what stands between digits and signs, `set` at its end left away: `retrieval-0.tar` does not validate.

    Returns:
        The files of `train` and `val`; None where one of the two has none.
    """
    every = list(names)
    training = _with_a_word(every, _TRAINING)
    others = [name for name in every if name not in training]
    validation = _with_a_word(others, _VALIDATION) or _with_a_word(others, _TEST)
    return {"train": training, "val": validation} if training and validation else None


def _with_a_word(names: Sequence[str], words: tuple[str, ...]) -> list[str]:
    bare_names = ((name, remote.bare(name).rpartition("/")[2]) for name in names)
    found = ((name, {word.removesuffix("set") for word in _WORD.findall(file.lower())}) for name, file in bare_names)
    return [name for name, own_words in found if not own_words.isdisjoint(words)]


def split_indices(labels: np.ndarray, fraction: float | None, split: str, *, where: str) -> np.ndarray:
    """Choose one part's samples.

    Each class gives the stated share of its samples, drawn with a fixed seed, to validation: at least one, but never
    its only one. Of 0 all samples train.

    Args:
        labels: of all samples.
        fraction: `data.val_fraction`.
        split: `train` or `val`.
        where: the data, for the error.

    Raises:
        ConfigError: if no fraction is stated, or it leaves nothing to validate on and that is asked for.
    """
    if fraction is None:
        raise ConfigError(
            f"{where} holds one set of images; say which share of each class validates, data.val_fraction=0.1 for "
            f"example or 0 for none, or put them into {where}/train and {where}/val"
        )
    if fraction == 0:
        if split == "train":
            return np.arange(len(labels))
        raise ConfigError(
            f"data.val_fraction=0 leaves no images of {where} to validate on; data.val_fraction=0.1, for example, or "
            f"another data.path has some"
        )
    validates = np.zeros(len(labels), dtype=bool)
    # Sorted once: to look for each of 1,000 classes in 1.3 million labels takes seconds.
    by_label = labels.argsort(kind="stable")
    distinct, starts = np.unique(labels[by_label], return_index=True)
    for label, members in zip(distinct, np.split(by_label, starts)[1:], strict=True):
        generator = np.random.Generator(np.random.Philox(key=[_SPLIT_SEED, int(label)]))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        validates[generator.permutation(members)[:count]] = True
    if not validates.any():
        raise ConfigError(
            f"{where} has one image per class, which is needed to train; add images, or put others into {where}/val"
        )
    return np.flatnonzero(validates if split == "val" else ~validates)
