"""The embedded digits are scikit-learn's."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from megavit.data.sources.digits import Digits


def test_the_digits_and_their_split_are_scikit_learns():
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    train_x, val_x, train_y, val_y = train_test_split(
        pixels, digits.target, test_size=360, random_state=0, stratify=digits.target
    )
    for split, images, labels in (("train", train_x, train_y), ("val", val_x, val_y)):
        source = Digits(split)
        assert len(source) == len(labels)
        assert np.array_equal(np.stack([source.image(i)[0].numpy() for i in range(len(source))]), images)
        assert [source.label(i) for i in range(len(source))] == labels.tolist()
