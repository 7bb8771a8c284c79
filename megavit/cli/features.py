"""Write a feature vector for each image of a dataset, as safetensors (`megavit features from=RUN out=FOLDER`)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.write import write_tensors
from megavit.cli.arguments import argument
from megavit.data.sources.base import name_of
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from megavit.inference.features import FeatureExtractor, Features
from megavit.inference.load import check_pool
from megavit.inference.run_config import prepare_on_one_rank
from megavit.model.config import Pool
from megavit.runtime.output import complete_file, make_folder
from megavit.validation import format_value

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class FeaturesArgs:
    """The command's own arguments.

    Attributes:
        from_: a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.
        out: folder of the results; an existing file is not overwritten.
        splits: the splits to read.
        pool: pooling of the tokens; without it the head's.
    """

    from_: str = argument(form="RUN")
    out: Path = argument(form="FOLDER")
    splits: tuple[str, ...] = _SPLITS
    pool: Pool | None = None


def features(args: FeaturesArgs, settings: list[str]) -> int:
    """Write FOLDER/train.safetensors and FOLDER/val.safetensors.

    Each file holds `features`, fp32 [images, hidden]. For data with labels it also holds `labels`: int64 [images], or
    bool [images, classes] with `data.multi_label`. Images are in the dataset's order, preprocessed as in an evaluation.
    FOLDER/train.txt and FOLDER/val.txt name the images, one per line: the file, or the row or member of an archive.

    Args:
        args: the command's own arguments.
        settings: `key=value` of the data, as in `megavit evaluate`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if there is no checkpoint, an argument is wrong, or a file exists already.
    """
    config, weights = prepare_on_one_rank("megavit features", args.from_, settings)
    check_pool(args.pool, config.model)
    files = _files(args)
    sources = {split: open_source(config.data, split) for split in files}
    extractor = FeatureExtractor(config, weights, args.pool)
    for split, file in files.items():
        found = extractor.extract(sources[split], split)
        names = (name_of(sources[split], index) for index in range(len(sources[split])))
        # Write the names first, so that features never exist without names.
        with complete_file(file.with_suffix(".txt")) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        _write(found, file, {**extractor.about, "split": split})
        count, width = found.features_IH.shape
        print(f"{file}: {count:,} images × {width}, pool={extractor.pool.value}, from {weights}")
    return 0


def _files(args: FeaturesArgs) -> dict[str, Path]:
    """Return the file of each split, none of which exists."""
    splits = list(dict.fromkeys(args.splits))
    for split in splits:
        if split not in _SPLITS:
            raise ConfigError(
                f"splits={','.join(args.splits)}: there is no split '{split}'; give train, val or train,val"
            )
    make_folder(args.out)
    files = {split: args.out / f"{split}.safetensors" for split in splits}
    for file in files.values():
        if file.exists():
            raise ConfigError(f"{file} exists already and is not overwritten; give another out=, or remove it")
    return files


def _write(found: Features, file: Path, about: dict[str, Any]) -> None:
    tensors = {"features": found.features_IH}
    if found.labels is not None:
        tensors["labels"] = found.labels
    texts = {key: str(format_value(value)) for key, value in about.items()}
    with complete_file(file) as temporary:
        write_tensors(temporary, tensors, {**texts, "classes": json.dumps(found.classes)})
