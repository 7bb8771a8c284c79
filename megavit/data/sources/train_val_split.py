"""Split data into training and validation: by file names, or by a fraction of each class."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from megavit.data.sources import remote
from megavit.errors import ConfigError

# Names of splits, in any case. Test data are for validation if there are no validation data.
_TRAINING, _VALIDATION, _TEST = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "dev"),
    ("test", "testing"),
)
SPLIT_WORDS = (*_TRAINING, *_VALIDATION, *_TEST)
_WORD = re.compile(r"[^\W\d_]+")

_SPLIT_SEED = 0


def find_splits(names: Iterable[str]) -> dict[str, str] | None:
    """Find the names of the training and the validation split among names of folders or splits.

    Returns:
        The names of `train` and `val`; None if one is missing or ambiguous.
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
    """Assign files to splits by words in their names: train or training; val, valid, …, or else test.

    Words are separated by digits and punctuation, and a final `set` is ignored: `retrieval-0.tar` does not validate.

    Returns:
        The files of `train` and `val`; None if one of the two has none.
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
    """Choose the samples of one split.

    The stated fraction of each class's samples, chosen with a fixed seed, is for validation: at least one sample, but
    never the only one. With 0 all samples are for training.

    Args:
        labels: labels of all samples.
        fraction: `data.val_fraction`.
        split: `train` or `val`.
        where: path of the data, for the error.

    Raises:
        ConfigError: if the fraction is null, or if the validation split is requested and has no samples.
    """
    if fraction is None:
        raise ConfigError(
            f"{where} has one set of images; set the fraction of each class for validation, data.val_fraction=0.1 for "
            f"example or 0 for none, or put them into {where}/train and {where}/val"
        )
    if fraction == 0:
        if split == "train":
            return np.arange(len(labels))
        raise ConfigError(
            f"data.val_fraction=0 leaves no images of {where} to validate on; set data.val_fraction=0.1, for example, "
            f"or another data.path"
        )
    validates = np.zeros(len(labels), dtype=bool)
    # Sort once: searching 1.3 million labels for each of 1,000 classes takes seconds.
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
