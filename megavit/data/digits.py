"""scikit-learn's 1,797 real handwritten digits of 8×8 pixels, inside the package: the data of the first run.

Source: the test set of UCI's "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

_VALIDATION_SAMPLES = 360
_SPLIT_SEED = 0


class Digits:
    """One split of the digits: 1,437 to train on, 360 to validate on, the classes in equal shares, always the same.

    Args:
        split: `train` or `val`.
    """

    classes: tuple[str, ...] = tuple("0123456789")
    image_shape: tuple[int, ...] | None = (1, 8, 8)

    def __init__(self, split: str) -> None:
        images, labels = _split()[split]
        self._images = torch.from_numpy(images)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8, 0 to 255."""
        return self._images[index].unsqueeze(0)

    def label(self, index: int) -> int:
        """The digit."""
        return int(self._labels[index])


@cache
def _split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    train_x, val_x, train_y, val_y = train_test_split(
        pixels, digits.target, test_size=_VALIDATION_SAMPLES, random_state=_SPLIT_SEED, stratify=digits.target
    )
    return {"train": (train_x, train_y), "val": (val_x, val_y)}
