"""Fit a linear classifier on the features of a few images of each class."""

import numpy as np

from megavit.inference.features import Features

# Inverse strength of the L2 penalty in scikit-learn's LogisticRegression; this is scikit-learn's default.
C = 1.0
_MOST_ITERATIONS = 1000


def draw_rows(labels: np.ndarray, shots: int, *, seed: int, draw: int) -> np.ndarray:
    """Choose `shots` training images of every class.

    The choice is a pure function of the arguments: it does not depend on the features, other draws or other shots.

    Args:
        labels: labels of all training images.
        shots: images per class.
        seed: random seed of all draws.
        draw: index of the draw.

    Returns:
        Indices in the dataset, class by class.
    """
    generator = np.random.default_rng([seed, shots, draw])
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    return np.concatenate([generator.choice(some, shots, replace=False) for some in members])


def fit_and_score(train: Features, val: Features, rows: np.ndarray) -> float:
    """Fit a classifier on some of the training images and return its top-1 accuracy on all of `val`.

    Args:
        train: features of the training images.
        val: features of the validation images.
        rows: indices in `train` of the images to fit on.
    """
    # Imported here because the import takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert train.labels is not None
    assert val.labels is not None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=_MOST_ITERATIONS))
    classifier.fit(train.features_IH.numpy()[rows], train.labels.numpy()[rows])
    return float((classifier.predict(val.features_IH.numpy()) == val.labels.numpy()).mean())
