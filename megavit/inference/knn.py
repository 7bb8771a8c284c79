"""Classify images by their nearest neighbours in feature space.

Shapes: Q images of a block, I training images, H hidden, J nearest training images, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.inference.features import Features

# Similarities, and votes, that are held at once: 256 MiB of each in fp32. Beside them lie the training images' features
# and their normed copy, 2 · I · H numbers: 1.28 million images of ViT-B make 7.9 GB, whatever the validation set.
_NUMBERS_AT_ONCE = 2**26
# Of top-5 accuracy.
GUESSES = 5


@torch.no_grad()
def count_right(
    train: Features,
    val: Features,
    *,
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
    numbers_at_once: int = _NUMBERS_AT_ONCE,
) -> dict[int, tuple[int, int]]:
    """Count images of `val` whose label is the first prediction, and among the first five, per number of neighbours.

    Each of an image's k nearest training images in cosine similarity s votes for its own class with exp(s /
    temperature). A class without any vote is not predicted, so that k=1 has no five predictions.

    Args:
        train: the images that vote.
        val: the images to classify.
        ks: numbers of neighbours, none above the training images.
        temperature: of the votes; the smaller, the more the nearest decide.
        device: where it is computed.
        numbers_at_once: bound of the similarities, and of the votes, in memory at a time.

    Source: arXiv 1805.01978, section 3.4; facebookresearch/dino, eval_knn.py (votes, and the default temperature).
    """
    assert train.labels is not None
    assert val.labels is not None
    bank_IH = F.normalize(train.features_IH.to(device), dim=1)
    labels_I = train.labels.to(device)
    num_classes, right = len(train.classes), dict.fromkeys(ks, (0, 0))
    at_once = max(1, numbers_at_once // max(len(bank_IH), num_classes))
    for features_QH, labels_Q in zip(val.features_IH.split(at_once), val.labels.split(at_once), strict=True):
        similarities_QI = F.normalize(features_QH.to(device), dim=1) @ bank_IH.T
        nearest_QJ, places_QJ = similarities_QI.topk(max(ks), dim=1)
        # Relative to the nearest: the predictions are the same, and no temperature makes exp overflow.
        weights_QJ = ((nearest_QJ - nearest_QJ[:, :1]) / temperature).exp()
        named_QJ, labels_Q = labels_I[places_QJ], labels_Q.to(device)
        for k, (top1, top5) in right.items():
            votes_QK = weights_QJ.new_zeros(len(labels_Q), num_classes)
            votes_QK.scatter_add_(1, named_QJ[:, :k], weights_QJ[:, :k])
            first, among = _hits(votes_QK, labels_Q)
            right[k] = (top1 + first, top5 + among)
    return right


def _hits(votes_QK: Tensor, labels_Q: Tensor) -> tuple[int, int]:
    best = votes_QK.topk(min(GUESSES, votes_QK.shape[1]), dim=1)
    hits = (best.indices == labels_Q[:, None]) & (best.values > 0)
    return int(hits[:, 0].sum()), int(hits.sum())
