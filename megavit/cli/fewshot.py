"""Fit a linear classifier on the features of a few images of each class (`megavit fewshot from=RUN`)."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from megavit.cli.arguments import argument
from megavit.data.sources.base import all_labels
from megavit.errors import ConfigError
from megavit.inference.features import FeatureExtractor, open_labelled
from megavit.inference.fewshot import C, draw_rows, fit_and_score
from megavit.inference.load import check_pool
from megavit.inference.run_config import prepare_on_one_rank
from megavit.model.config import Pool
from megavit.runtime.output import check_json, write_json


@dataclass(frozen=True)
class FewshotArgs:
    """The command's own arguments.

    Attributes:
        from_: a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.
        shots: numbers of training images of each class to fit on.
        draws: number of random choices of those images, for each number of shots.
        seed: random seed of the choices.
        pool: pooling of the tokens; without it the head's.
        out: file for the results, in addition to the output.
    """

    from_: str = argument(form="RUN")
    shots: tuple[int, ...] = (1, 5, 10)
    draws: int = 5
    seed: int = argument(0, at_least=0)
    pool: Pool | None = None
    out: Path | None = argument(None, form="FILE.json")


def fewshot(args: FewshotArgs, settings: list[str]) -> int:
    """Fit on a few random training images of each class, several times, and score on the full validation set.

    Args:
        args: the command's own arguments.
        settings: `key=value` of the data, as in `megavit evaluate`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if there is no checkpoint, an argument is wrong, or a class has too few images.
    """
    config, weights = prepare_on_one_rank("megavit fewshot", args.from_, settings)
    check_pool(args.pool, config.model)
    check_json(args.out)
    training, validation = open_labelled(config.data, why="a classifier learns from")
    labels = all_labels(training)
    _refuse_too_many(max(args.shots), labels, training.classes, source=config.data.source)
    extractor = FeatureExtractor(config, weights, args.pool)
    train, val = extractor.extract(training, "train"), extractor.extract(validation, "val")
    print(
        f"{weights}: {len(training.classes)} classes, {len(validation):,} validation images, "
        f"pool={extractor.pool.value} draws={args.draws} seed={args.seed}, logistic regression with C={C:g}"
    )
    results = []
    for shots in args.shots:
        rows = [draw_rows(labels, shots, seed=args.seed, draw=draw) for draw in range(args.draws)]
        top1 = [fit_and_score(train, val, chosen) for chosen in rows]
        mean, low, high = fmean(top1), min(top1), max(top1)
        results.append({"shots": shots, "mean": mean, "min": low, "max": high, "top1": top1})
        print(f"shots={shots}  top1 {mean:.4f}  min {low:.4f}  max {high:.4f}")
    if args.out is not None:
        how = {"C": C, "draws": args.draws, "seed": args.seed, "val_images": len(validation)}
        write_json(args.out, {**extractor.about, **how, "results": results})
        print(f"details in {args.out}")
    return 0


def _refuse_too_many(shots: int, labels: np.ndarray, classes: tuple[str, ...], *, source: str) -> None:
    if len(classes) < 2:
        raise ConfigError(f"data.source={source} has one class, {classes[0]}: a classifier needs at least two")
    counts = np.bincount(labels, minlength=len(classes))
    fewest = int(counts.argmin())
    if counts[fewest] < shots:
        short = int((counts < shots).sum())
        raise ConfigError(
            f"shots={shots} is more than the {counts[fewest]} training images of class {classes[fewest]} ({short} of "
            f"{len(classes)} classes of data.source={source} have fewer than {shots}); "
            + (f"give shots=… of at most {counts[fewest]}" if counts[fewest] else "remove it: data.classes=[…]")
        )
