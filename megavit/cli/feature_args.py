"""Arguments that `megavit features`, `knn` and `fewshot` share, and the files they write."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavit.checkpoint.find import CheckpointRef
from megavit.cli.arguments import prepare, split_own
from megavit.config.experiment import ExperimentConfig
from megavit.data.sources.base import Source
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from megavit.inference.load import check_pool
from megavit.model.config import Pool
from megavit.parallel.layout import world_size_from_environment
from megavit.runtime.output import check_writable, complete_file


@dataclass(frozen=True)
class FeatureArgs:
    """What one of the verbs is to do.

    Attributes:
        options: the verb's own arguments but `pool`, as typed.
        config: the run's, with what is typed on top.
        weights: whose features.
        pool: as typed; None for the features that the head reads.
    """

    options: dict[str, str]
    config: ExperimentConfig
    weights: CheckpointRef
    pool: Pool | None


def read_feature_args(command: str, arguments: list[str], *, options: Iterable[str]) -> FeatureArgs:
    """What is typed, and the run's own configuration under it.

    Args:
        command: for the messages.
        arguments: `from=RUN`, the verb's own arguments, `pool=cls|mean` and settings.
        options: keys that are the verb's own, beside `pool`.

    Raises:
        ConfigError: if there is no checkpoint, or an argument does not fit.
    """
    typed, settings = split_own(command, arguments, known=[*options, "pool"])
    for setting in settings:
        if setting.startswith(("parallel.", "run.ranks=")):
            raise ConfigError(
                f"{setting}: megavit {command} runs in one process, which holds the whole model; leave it away"
            )
    if world_size_from_environment() > 1:
        raise ConfigError(f"megavit {command} runs in one process; start it once, without torchrun")
    named = typed.pop("pool", None)
    if named is not None and named not in Pool.__members__:
        raise ConfigError(f"pool={named} must be one of {', '.join(Pool.__members__)}")
    pool = Pool[named] if named is not None else None
    config, weights = prepare(command, settings, world_size=1)
    check_pool(pool, config.model)
    return FeatureArgs(typed, config, weights, pool)


def open_labelled(args: FeatureArgs, *, why: str) -> tuple[Source, Source]:
    """The training and the validation split, each image of which has one label.

    Args:
        args: from `read_feature_args`.
        why: what labels are needed for, for the error.

    Raises:
        ConfigError: if the data are not there, or not so.
    """
    data = args.config.data
    if data.multi_label:
        raise ConfigError(
            f"data.multi_label=true: {why} one label of each image; choose data with one and data.multi_label=false, "
            f"or take the features themselves: megavit features"
        )
    training, validation = open_source(data, "train"), open_source(data, "val")
    if not training.classes:
        raise ConfigError(
            f"data.source={data.source} has no labels: {why} one label of each image; choose data that has them: "
            f"data.source=folder data.path=LABELLED"
        )
    if training.classes != validation.classes:
        raise ConfigError(
            f"the training images of data.source={data.source} have {len(training.classes)} classes and the validation "
            f"images {len(validation.classes)}, or other names; both must have the same"
        )
    return training, validation


def results_file(args: FeatureArgs) -> Path | None:
    """Where `out=FILE.json` wants the results, None without it; its folder is made.

    Raises:
        ConfigError: if the name does not end so, or the file cannot be written.
    """
    if "out" not in args.options:
        return None
    out = Path(args.options["out"])
    if out.suffix != ".json":
        raise ConfigError(f"out={out} must end in .json")
    check_writable(out)
    return out


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results as JSON.

    Raises:
        ConfigError: if the file cannot be written.
    """
    with complete_file(out) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder that results are to lie in, before anything long begins.

    Raises:
        ConfigError: if it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"out: {folder} is a file; give a folder, there or to be made") from error
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be made: {error.strerror}") from error
