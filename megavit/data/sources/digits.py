"""Read the digits that the package contains for first runs: 1,797 handwritten ones of 8×8 pixels.

They are scikit-learn's `load_digits`, scaled to 0 to 255 and split by its `train_test_split`. They are stored as a
file, because importing scikit-learn took 1.3 s of every start.

Source: the test set of UCI's "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak (CC BY 4.0).
"""

from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from megavit.data.config import DataConfig


class Digits:
    """One split of the digits: 1,437 for training, 360 for validation, stratified by class, always the same.

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
        """Return one image_CYX, uint8, 0 to 255."""
        return self._images[index].unsqueeze(0)

    def label(self, index: int) -> int:
        """Return the digit."""
        return int(self._labels[index])


def open_digits(config: DataConfig, split: str) -> Digits:
    """Open one split; the digits need no setting."""
    return Digits(split)


@cache
def _split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with (
        files("megavit.data.sources").joinpath("digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as archive,
    ):
        return {split: (archive[f"{split}_images"], archive[f"{split}_labels"]) for split in ("train", "val")}
