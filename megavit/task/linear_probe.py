"""A linear classifier on an encoder that stays as it is: how much of the classes its features tell."""

from megavit.task.classification import ClassificationTask


class LinearProbe(ClassificationTask):
    """Classification by one matrix on features normalised without weights; the encoder is frozen by the trainer.

    Args: see `ClassificationTask`.

    Source: arXiv 2111.06377, section A.1.
    """

    norms_features = True
