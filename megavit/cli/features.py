"""`megavit features from=RUN out=FOLDER`: a vector for each image of a dataset, as safetensors."""

import json
from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.write import write_tensors
from megavit.cli.feature_args import FeatureArgs, make_folder, read_feature_args
from megavit.data.sources.base import name_of
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from megavit.inference.features import FeatureExtractor, Features
from megavit.runtime.output import complete_file
from megavit.validation import format_value

_SPLITS = ("train", "val")


def features(arguments: list[str]) -> int:
    """Write FOLDER/train.safetensors and FOLDER/val.safetensors.

    In each `features`, fp32 [images, hidden], and of data with labels `labels`, int64 [images], with `data.multi_label`
    bool [images, classes]; images in the dataset's order, each once and as an evaluation sees it. FOLDER/train.txt and
    FOLDER/val.txt say which they are, a line an image: its file, or its row or place in an archive.

    Args:
        arguments: `from=RUN out=FOLDER`, optionally `splits=train,val pool=cls|mean`, and settings as in `megavit
            evaluate`.

    Raises:
        ConfigError: if there is no checkpoint, an argument does not fit, or a file is there already.
    """
    args = read_feature_args("features", arguments, options=("out", "splits"))
    files = _files(args)
    sources = {split: open_source(args.config.data, split) for split in files}
    extractor = FeatureExtractor(args.config, args.weights, args.pool)
    for split, file in files.items():
        found = extractor.extract(sources[split], split)
        names = (name_of(sources[split], index) for index in range(len(sources[split])))
        # First the names: where there are features there are names.
        with complete_file(file.with_suffix(".txt")) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        _write(found, file, {**extractor.about, "split": split})
        count, width = found.features_IH.shape
        print(f"{file}: {count:,} images × {width}, pool={extractor.pool.value}, by {args.weights}")
    return 0


def _files(args: FeatureArgs) -> dict[str, Path]:
    """The file of each split, none of which is there."""
    splits = list(dict.fromkeys(args.options.get("splits", ",".join(_SPLITS)).split(",")))
    for split in splits:
        if split not in _SPLITS:
            raise ConfigError(
                f"splits={args.options['splits']}: there is no split '{split}'; give train, val or train,val"
            )
    if "out" not in args.options:
        raise ConfigError("megavit features needs out=FOLDER, where the features are to lie")
    folder = Path(args.options["out"])
    make_folder(folder)
    files = {split: folder / f"{split}.safetensors" for split in splits}
    for file in files.values():
        if file.exists():
            raise ConfigError(f"{file} is there already and stays as it is; give another out=, or remove it")
    return files


def _write(found: Features, file: Path, about: dict[str, Any]) -> None:
    tensors = {"features": found.features_IH}
    if found.labels is not None:
        tensors["labels"] = found.labels
    texts = {key: str(format_value(value)) for key, value in about.items()}
    with complete_file(file) as temporary:
        write_tensors(temporary, tensors, {**texts, "classes": json.dumps(found.classes)})
