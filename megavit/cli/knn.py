"""`megavit knn from=RUN`: how far a run's features tell classes apart, without anything learned on top.

Shapes: Q images asked about at once, I training images, H hidden, J nearest training images, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.cli.feature_args import FeatureArgs, open_labelled, read_feature_args, results_file, write_results
from megavit.data.sources.base import Source
from megavit.errors import ConfigError
from megavit.inference.features import FeatureExtractor, Features
from megavit.validation import parse_ints

# Similarities, and votes, that are held at once: 256 MiB of each in fp32. Beside them lie the training images' features
# and their normed copy, 2 · I · H numbers: 1.28 million images of ViT-B make 7.9 GB, whatever the validation set.
_NUMBERS_AT_ONCE = 2**26
_GUESSES = 5


def knn(arguments: list[str]) -> int:
    """Name every validation image by its nearest training images and say how often that is right.

    Args:
        arguments: `from=RUN`, optionally `k=10,20,100 temperature=0.07 pool=cls|mean out=FILE.json`, and settings as in
            `megavit evaluate`.

    Raises:
        ConfigError: if there is no checkpoint, an argument does not fit, or the data has not one label for each image.
    """
    args = read_feature_args("knn", arguments, options=("k", "temperature", "out"))
    ks = parse_ints("k", args.options.get("k", "10,20,100"))
    temperature = _temperature(args)
    out = results_file(args)
    training, validation = open_labelled(args, why="nearest neighbours vote with")
    _refuse_too_many(ks, training, args)
    extractor = FeatureExtractor(args.config, args.weights, args.pool)
    train, val = extractor.extract(training, "train"), extractor.extract(validation, "val")
    right = count_right(train, val, ks=ks, temperature=temperature, device=extractor.device)
    count = len(validation)
    results = [{"k": k, "top1": top1 / count, f"top{_GUESSES}": top5 / count} for k, (top1, top5) in right.items()]
    print(
        f"{args.weights}: {count:,} validation images against {len(training):,} training images, "
        f"pool={extractor.pool.value} temperature={temperature:g}"
    )
    for row in results:
        print(f"k={row['k']}  top1 {row['top1']:.4f}  top{_GUESSES} {row[f'top{_GUESSES}']:.4f}")
    if out is not None:
        how = {"temperature": temperature, "train_images": len(training), "val_images": count}
        write_results(out, {**extractor.about, **how, "results": results})
        print(f"{out} has it all")
    return 0


@torch.no_grad()
def count_right(
    train: Features,
    val: Features,
    *,
    ks: list[int],
    temperature: float,
    device: torch.device,
    numbers_at_once: int = _NUMBERS_AT_ONCE,
) -> dict[int, tuple[int, int]]:
    """How many of `val` have their label as the first guess, and among the first five, for each number of neighbours.

    Each of an image's k nearest training images in cosine similarity s votes for its own class with exp(s /
    temperature). A class without any vote is not guessed, so that k=1 has no five guesses.

    Args:
        train: the images that vote.
        val: the images asked about.
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
        # Relative to the nearest: the guesses are the same, and no temperature makes exp overflow.
        weights_QJ = ((nearest_QJ - nearest_QJ[:, :1]) / temperature).exp()
        named_QJ, labels_Q = labels_I[places_QJ], labels_Q.to(device)
        for k, (top1, top5) in right.items():
            votes_QK = weights_QJ.new_zeros(len(labels_Q), num_classes)
            votes_QK.scatter_add_(1, named_QJ[:, :k], weights_QJ[:, :k])
            first, among = _hits(votes_QK, labels_Q)
            right[k] = (top1 + first, top5 + among)
    return right


def _hits(votes_QK: Tensor, labels_Q: Tensor) -> tuple[int, int]:
    best = votes_QK.topk(min(_GUESSES, votes_QK.shape[1]), dim=1)
    hits = (best.indices == labels_Q[:, None]) & (best.values > 0)
    return int(hits[:, 0].sum()), int(hits.sum())


def _temperature(args: FeatureArgs) -> float:
    text = args.options.get("temperature", "0.07")
    try:
        temperature = float(text)
    except ValueError:
        temperature = math.nan
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature={text} must be a finite number above 0")
    return temperature


def _refuse_too_many(ks: list[int], training: Source, args: FeatureArgs) -> None:
    most = max(ks)
    if most > len(training):
        raise ConfigError(
            f"k={most} is more than the {len(training):,} training images of data.source={args.config.data.source}; "
            f"give k=… of at most {len(training)}"
        )
