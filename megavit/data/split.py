"""A training and a validation part where data come as one: always the same, in each class the same share."""

import numpy as np

from megavit.errors import ConfigError

_SPLIT_SEED = 0


def split_indices(labels: np.ndarray, fraction: float | None, split: str, *, where: str) -> np.ndarray:
    """Choose one part's samples.

    Each class gives the stated share of its samples, drawn with a fixed seed, to validation: at least one, but never
    its only one.

    Args:
        labels: of all samples.
        fraction: `data.val_fraction`.
        split: `train` or `val`.
        where: the data, for the error.

    Raises:
        ConfigError: if no fraction is stated, or it leaves nothing to validate on.
    """
    if fraction is None:
        raise ConfigError(
            f"{where} holds one set of images; say which share of each class validates, data.val_fraction=0.1 for "
            f"example, or put them into {where}/train and {where}/val"
        )
    validates = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        generator = np.random.Generator(np.random.Philox(key=[_SPLIT_SEED, int(label)]))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        validates[generator.permutation(members)[:count]] = True
    if not validates.any():
        raise ConfigError(
            f"{where} has one image per class, which is needed to train; add images, or put others into {where}/val"
        )
    return np.flatnonzero(validates if split == "val" else ~validates)
