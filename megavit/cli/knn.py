"""Classify validation images by their nearest training images in feature space (`megavit knn from=RUN`)."""

from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import argument
from megavit.errors import ConfigError
from megavit.inference.features import FeatureExtractor, open_labelled
from megavit.inference.knn import GUESSES, count_right
from megavit.inference.load import check_pool
from megavit.inference.run_config import prepare_on_one_rank
from megavit.model.config import Pool
from megavit.runtime.output import check_json, write_json


@dataclass(frozen=True)
class KnnArgs:
    """The command's own arguments.

    Attributes:
        from_: a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.
        k: numbers of nearest training images that vote.
        temperature: temperature of the votes; a smaller one gives the nearest images more weight.
        pool: pooling of the tokens; without it the head's.
        out: file for the results, in addition to the output.
    """

    from_: str = argument(form="RUN")
    k: tuple[int, ...] = (10, 20, 100)
    temperature: float = argument(0.07, above=0)
    pool: Pool | None = None
    out: Path | None = argument(None, form="FILE.json")


def knn(args: KnnArgs, settings: list[str]) -> int:
    """Classify every validation image by its nearest training images and print the accuracy.

    Args:
        args: the command's own arguments.
        settings: `key=value` of the data, as in `megavit evaluate`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if there is no checkpoint, an argument is wrong, or the data does not have one label per image.
    """
    config, weights = prepare_on_one_rank("megavit knn", args.from_, settings)
    check_pool(args.pool, config.model)
    check_json(args.out)
    training, validation = open_labelled(config.data, why="nearest neighbours vote with")
    if max(args.k) > len(training):
        raise ConfigError(
            f"k={max(args.k)} is more than the {len(training):,} training images of data.source={config.data.source}; "
            f"give k=… of at most {len(training)}"
        )
    extractor = FeatureExtractor(config, weights, args.pool)
    train, val = extractor.extract(training, "train"), extractor.extract(validation, "val")
    right = count_right(train, val, ks=args.k, temperature=args.temperature, device=extractor.device)
    count = len(validation)
    results = [{"k": k, "top1": top1 / count, f"top{GUESSES}": top5 / count} for k, (top1, top5) in right.items()]
    print(
        f"{weights}: {count:,} validation images against {len(training):,} training images, "
        f"pool={extractor.pool.value} temperature={args.temperature:g}"
    )
    for row in results:
        print(f"k={row['k']}  top1 {row['top1']:.4f}  top{GUESSES} {row[f'top{GUESSES}']:.4f}")
    if args.out is not None:
        how = {"temperature": args.temperature, "train_images": len(training), "val_images": count}
        write_json(args.out, {**extractor.about, **how, "results": results})
        print(f"details in {args.out}")
    return 0
