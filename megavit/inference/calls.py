"""`megavit.evaluate`, `megavit.predict` and `megavit.convert`: what the commands of these names do, from Python."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.hf_hub import push as push_to_hub
from megavit.config.keywords import to_overrides
from megavit.config.overrides import write_text
from megavit.data.sources.image_files import find_images
from megavit.errors import ConfigError
from megavit.inference.convert import Converted, check_push, convert_weights
from megavit.inference.predict import Classifier, Prediction
from megavit.inference.run_config import prepare
from megavit.plugins import passed_objects
from megavit.runtime.command import run_command
from megavit.runtime.workers import num_ranks
from megavit.train.session import process_restored, refuse_launcher
from megavit.train.start import refuse_passed


def evaluate(run: str | os.PathLike[str], *overrides: str, **settings: Any) -> dict[str, Any]:
    """Compute the metrics of a checkpoint on the validation set; the same as `megavit evaluate`.

    One rank evaluates in this process; several (`**{"run.ranks": 2}`, or one for each GPU) are other processes.

    Args:
        run: a `Run`, a run's folder or one of its checkpoints; the prefix `ema:` evaluates the moving average.
        overrides: settings on top of the run's, `"parallel.tp=2"` for example.
        settings: the same by path or last word, as for `megavit.train`.

    Returns:
        What `evaluation/…/metrics.json` in the run's folder holds: `loss`, the task's metrics, `count` (images),
        `top1_per_class`, the checkpoint and the data.

    Raises:
        ConfigError: if there is no checkpoint, or a setting does not fit.
        RunError: if a rank in another process fails.
    """
    with process_restored(), passed_objects() as name_object:
        from megavit.inference.evaluate import evaluate as evaluate_rank
        from megavit.inference.evaluate import results_folder

        refuse_launcher("megavit.evaluate")
        typed = to_overrides(overrides, settings, takes_recipe=False, name_object=name_object)
        place = os.fspath(run)
        ranks = num_ranks(prepare(place, typed)[0])
        config, weights = prepare(place, typed, world_size=ranks)
        if ranks > 1:
            refuse_passed(config, ranks)
            # This checkpoint, whatever is saved meanwhile.
            prefix = "ema:" if weights.averaged else ""
            source = write_text("from", f"{prefix}{weights.checkpoint}")
            run_command(["evaluate", source, *typed, f"run.ranks={ranks}"])
        else:
            evaluate_rank(config, weights)
        results: dict[str, Any] = json.loads((results_folder(weights, config.data) / "metrics.json").read_text())
    return results


def predict(
    run: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *overrides: str,
    top: int = 5,
    skip_unreadable: bool = False,
    **settings: Any,
) -> list[Prediction]:
    """Classify image files; the same as `megavit predict`.

    Args:
        run: a `Run`, a run's folder or one of its checkpoints; the prefix `ema:` takes the moving average.
        images: an image, a folder of images, or several of these.
        overrides: data.mean, data.std, data.crop_pct or data.interpolation other than the run's.
        top: number of classes of each prediction, at most all.
        skip_unreadable: leave out images that cannot be read, with a warning for each, instead of raising.
        settings: the overrides by path or last word.

    Returns:
        A prediction for each image, sorted by name within a folder: its path, the names of its most probable classes
        and their probabilities. `pandas.DataFrame(predictions)` makes a table of them.

    Raises:
        ConfigError: if the run is no classifier's, or an image cannot be read.
    """
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1")
    places = [images] if isinstance(images, str | os.PathLike) else list(images)
    with process_restored():
        refuse_launcher("megavit.predict")
        typed = to_overrides(overrides, settings, takes_recipe=False)
        classifier = Classifier(os.fspath(run), typed)
        paths = [path for place in places for path in find_images(Path(place))]
        results = list(classifier.classify(paths, top=top))
    unread = [result for result in results if isinstance(result, ConfigError)]
    if unread and not skip_unreadable:
        raise unread[0]
    for error in unread:
        warnings.warn(str(error), stacklevel=2)
    return [result for result in results if isinstance(result, Prediction)]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *overrides: str,
    dtype: str | None = None,
    num_heads: int | None = None,
    push: str | None = None,
    **settings: Any,
) -> Converted:
    """Convert weights from and to timm, Hugging Face, MAE and NeMo; the same as `megavit convert from=… to=…`.

    One of source and target is a run, the other `"KIND:PATH"`: `megavit.convert(run, "hf:FOLDER")`,
    `megavit.convert("timm:FILE", "runs/mine")`.

    Args:
        source: a `Run`, a run's folder or one of its checkpoints, with the prefix `ema:` the moving average; or
            `timm:FILE`, `hf:FOLDER_OR_ID`, `mae:FILE`, `nemo:FILE`.
        target: `timm:FILE`, `hf:FOLDER`, `mae:FILE`, `nemo:FILE`, or the folder of a new run.
        overrides: data.mean, data.std, data.crop_pct and data.interpolation, where the files of another library do not
            state them.
        dtype: `fp32`, `bf16` or `fp16`, of weights written for another library; None for fp32.
        num_heads: attention heads of the weights read, where their files do not state them.
        push: with `hf:FOLDER`, the repository on the Hugging Face hub to upload to, `ORG/NAME`.
        settings: the overrides by path or last word.

    Returns:
        Where the weights were written, and notes: what was assumed, and what the files of one side cannot say.

    Raises:
        ConfigError: if one of them cannot be read, or the other has no place for what it holds.
    """
    with process_restored():
        refuse_launcher("megavit.convert")
        typed = to_overrides(overrides, settings, takes_recipe=False)
        check_push(push, os.fspath(target))
        converted = convert_weights(
            os.fspath(source), os.fspath(target), dtype=dtype, num_heads=num_heads, pixels=typed
        )
        if push is not None:
            push_to_hub(converted.path, push)
    return converted
