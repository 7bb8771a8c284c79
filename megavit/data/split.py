"""A training and a validation part: told by the files' names, or, where data come as one, of each class a share."""

from collections.abc import Iterable

import numpy as np

from megavit.data import remote
from megavit.errors import ConfigError

VALIDATION_NAMES = ("val", "validation", "test")

_SPLIT_SEED = 0


def parts_by_name(names: Iterable[str]) -> dict[str, list[str]] | None:
    """Files with 'train' in their names train, those with 'val', else 'validation', else 'test' validate.

    Returns:
        The files of `train` and `val`; None where one of the two has none.
    """
    every = list(names)
    training = [name for name in every if "train" in _own(name)]
    for word in VALIDATION_NAMES:
        validation = [name for name in every if word in _own(name) and name not in training]
        if training and validation:
            return {"train": training, "val": validation}
    return None


def _own(name: str) -> str:
    return remote.bare(name).rpartition("/")[2]


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
