"""Classify images by their nearest neighbours in feature space.

Shapes: Q images of a block, I training images, H hidden, J nearest training images, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.inference.features import Features

# Most similarities, and most votes, in memory at once: 256 MiB of each in fp32. The training images' features and their
# normalised copy take 2 · I · H numbers more: 7.9 GB for 1.28 million images of ViT-B, for any validation set.
_NUMBERS_AT_ONCE = 2**26
# Predictions counted in the top-5 accuracy.
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
    """Count the images of `val` that are classified correctly, top-1 and top-5, for several numbers of neighbours.

    Each of the k nearest training images, with cosine similarity s, votes for its class with the weight exp(s /
    temperature). A class without a vote is not predicted, so k=1 makes only one prediction.

    Args:
        train: features of the images that vote.
        val: features of the images to classify.
        ks: numbers of neighbours, at most the number of training images.
        temperature: temperature of the votes; a smaller one gives the nearest neighbours more weight.
        device: device of the computation.
        numbers_at_once: most similarities, and most votes, in memory at a time.

    Returns:
        For each k the number of images correct in the first prediction, and in the first five.

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
        # Subtract the nearest similarity: the predictions stay the same, and exp overflows at no temperature.
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
