"""`megavit fewshot from=RUN`: a linear classifier of a run's features, learned from a few images of each class."""

from statistics import fmean

import numpy as np

from megavit.cli.feature_args import FeatureArgs, open_labelled, read_feature_args, results_file, write_results
from megavit.data.sources.base import all_labels
from megavit.errors import ConfigError
from megavit.inference.features import FeatureExtractor, Features
from megavit.validation import parse_int, parse_ints

# Of scikit-learn's LogisticRegression: the inverse strength of its L2 penalty, its own default.
_C = 1.0
_MOST_ITERATIONS = 1000


def fewshot(arguments: list[str]) -> int:
    """Learn from a few random training images of each class, several times, and judge by the whole validation set.

    Args:
        arguments: `from=RUN`, optionally `shots=1,5,10 draws=5 seed=0 pool=cls|mean out=FILE.json`, and settings as in
            `megavit evaluate`.

    Raises:
        ConfigError: if there is no checkpoint, an argument does not fit, or a class has too few images.
    """
    args = read_feature_args("fewshot", arguments, options=("shots", "draws", "seed", "out"))
    shots = parse_ints("shots", args.options.get("shots", "1,5,10"))
    draws = parse_int("draws", args.options.get("draws", "5"))
    seed = parse_int("seed", args.options.get("seed", "0"), at_least=0)
    out = results_file(args)
    training, validation = open_labelled(args, why="a classifier learns from")
    labels = all_labels(training)
    _refuse_too_many(max(shots), labels, training.classes, args)
    extractor = FeatureExtractor(args.config, args.weights, args.pool)
    train, val = extractor.extract(training, "train"), extractor.extract(validation, "val")
    print(
        f"{args.weights}: {len(training.classes)} classes, {len(validation):,} validation images, "
        f"pool={extractor.pool.value} draws={draws} seed={seed}, logistic regression with C={_C:g}"
    )
    results = []
    for number in shots:
        rows = [draw_rows(labels, number, seed=seed, draw=draw) for draw in range(draws)]
        top1 = [learn(train, val, chosen) for chosen in rows]
        mean, low, high = fmean(top1), min(top1), max(top1)
        results.append({"shots": number, "mean": mean, "min": low, "max": high, "top1": top1})
        print(f"shots={number}  top1 {mean:.4f}  min {low:.4f}  max {high:.4f}")
    if out is not None:
        how = {"C": _C, "draws": draws, "seed": seed, "val_images": len(validation)}
        write_results(out, {**extractor.about, **how, "results": results})
        print(f"{out} has it all")
    return 0


def draw_rows(labels: np.ndarray, shots: int, *, seed: int, draw: int) -> np.ndarray:
    """Choose as many training images of every class: their places in the dataset, class by class.

    A pure function of its arguments: neither the features nor other draws and numbers of shots change it.

    Args:
        labels: of all training images.
        shots: images per class.
        seed: of all draws.
        draw: which of them.
    """
    generator = np.random.default_rng([seed, shots, draw])
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    return np.concatenate([generator.choice(some, shots, replace=False) for some in members])


def learn(train: Features, val: Features, rows: np.ndarray) -> float:
    """Fit a classifier on some of the training images; its top-1 over all of `val`.

    Args:
        train: features to learn from.
        val: features to judge by.
        rows: places in `train`.
    """
    # Imported where it is needed: that takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert train.labels is not None
    assert val.labels is not None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=_MOST_ITERATIONS))
    classifier.fit(train.features_IH.numpy()[rows], train.labels.numpy()[rows])
    return float((classifier.predict(val.features_IH.numpy()) == val.labels.numpy()).mean())


def _refuse_too_many(shots: int, labels: np.ndarray, classes: tuple[str, ...], args: FeatureArgs) -> None:
    source = args.config.data.source
    if len(classes) < 2:
        raise ConfigError(f"data.source={source} has one class, {classes[0]}: there is nothing to tell it from")
    counts = np.bincount(labels, minlength=len(classes))
    fewest = int(counts.argmin())
    if counts[fewest] < shots:
        short = int((counts < shots).sum())
        raise ConfigError(
            f"shots={shots} is more than the {counts[fewest]} training images of class {classes[fewest]} ({short} of "
            f"{len(classes)} classes of data.source={source} have fewer than {shots}); "
            + (f"give shots=… of at most {counts[fewest]}" if counts[fewest] else "leave it away: data.classes=[…]")
        )
