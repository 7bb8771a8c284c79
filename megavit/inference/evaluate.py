"""Evaluate a checkpoint of any layout, in any layout, on the full validation set (`megavit evaluate from=RUN`)."""

import csv
import json
import os
import re
import zlib
from enum import Enum
from functools import partial
from pathlib import Path

from torch import Tensor

from megavit.checkpoint.find import CheckpointRef
from megavit.config.experiment import ExperimentConfig
from megavit.data.bad_samples import BadSampleTracker
from megavit.data.config import DataConfig
from megavit.data.loader import Loader
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from megavit.inference.trained_run import label_as_trained, open_run, read_config
from megavit.metrics.plots import draw_confusion
from megavit.train.engine import Engine, prepare_task

# Settings of the data group that determine the images and labels of an evaluation.
_SEEN = (
    "source",
    "path",
    "val_fraction",
    "classes",
    "multi_label",
    "num_classes",
    "num_samples",
    "image_size",
    "channels",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
)

# Most letters that the data contribute to a folder's name.
_LONGEST = 60


def evaluate(config: ExperimentConfig, weights: CheckpointRef) -> int:
    """Evaluate on one rank; rank 0 writes the results to `RUN/evaluation/`.

    Args:
        config: the run's configuration with the command line's settings, checked for this world size.
        weights: the checkpoint to evaluate.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if the data do not fit the classifier, or too many images cannot be read.
    """
    source, notes = open_source(config.data, "val"), list[str]()
    present = source.classes
    if config.task.has_classes:
        source, notes = label_as_trained(source, config.data, weights.checkpoint)
    trained = open_run(config, weights, num_classes=len(source.classes))
    network, layout = trained.network, trained.layout
    task = network.task

    loader = partial(
        Loader,
        config=config.data,
        layout=layout,
        fields=task.fields,
        micro_batch=network.resolved.micro_batch,
        seed=config.run.seed,
    )
    if task.baseline_samples:
        prepare_task(task, loader, open_source(config.data, "train"), seed=config.run.seed)
    engine = Engine(network, list(network.chunks.values()), layout=layout)
    val_loader = loader(source, train=False)
    totals = engine.evaluate_sums(val_loader)
    bad_samples = BadSampleTracker(val_loader, "val", run_dir=weights.checkpoint.parent.parent)
    message = [*notes, *bad_samples.collect(0)]
    if layout.rank == 0:
        print(*message, sep="\n", end="\n" if message else "")
    if bad_samples.too_many is not None:
        raise ConfigError(bad_samples.too_many)
    if layout.rank == 0:
        metrics = {**task.metrics({name: float(totals[name]) for name in task.metric_sums}), **bad_samples.metrics}
        _report(totals, metrics, source.classes, weights, data=config.data, present=present)
    return 0


def _report(
    totals: dict[str, Tensor],
    metrics: dict[str, float],
    classes: tuple[str, ...],
    weights: CheckpointRef,
    *,
    data: DataConfig,
    present: tuple[str, ...],
) -> None:
    """Write the metrics and the confusion matrix, and print a summary.

    Args:
        totals: sums from `Engine.evaluate_sums`.
        metrics: the task's metrics by name.
        classes: class names in the order of the confusion matrix.
        weights: the checkpoint that was evaluated.
        data: the data group.
        present: the class names of the data, in the data's own order.
    """
    folder = results_folder(weights, data)
    folder.mkdir(parents=True, exist_ok=True)
    count = int(totals["count"])
    results: dict[str, object] = {
        "checkpoint": str(weights),
        "data": {"split": "val", **_describe(data), "classes": present},
        "count": count,
        **metrics,
    }
    summary = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    for name in {"top5", "hit5"} & totals.keys():
        results[name] = float(totals[name]) / count
        summary += f"  {name} {results[name]:.4f}"
    if "confusion" in totals:
        confusion = totals["confusion"].long()
        images = confusion.sum(dim=1)
        # A class without images has no accuracy.
        results["top1_per_class"] = {
            classes[label]: float(confusion[label, label] / images[label])
            for label in images.nonzero().flatten().tolist()
        }
        with (folder / "confusion.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["label \\ guess", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
        draw_confusion(confusion, classes=classes, path=folder / "confusion.png")
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    part = f" of {len(present)} of the {len(classes)} classes" if len(present) < len(classes) else ""
    print(f"{weights}: {count} images{part}  {summary}; details in {folder}")


def results_folder(weights: CheckpointRef, data: DataConfig) -> Path:
    """Return `RUN/evaluation/step_…`; for other data or preprocessing than the run's, append a name for them."""
    checkpoint = weights.checkpoint
    name = f"{checkpoint.name}{'_ema' if weights.averaged else ''}"
    described = _describe(data)
    if described != _describe(read_config(checkpoint).data):
        place = Path(data.path or "").name
        words = re.sub(r"[^\w.]+", "_", f"{data.source}_{place}" if place else data.source)[:_LONGEST]
        # Other data, or the same data with other preprocessing, may have the same words.
        name += f"-{words}-{zlib.crc32(json.dumps(described).encode()):08x}"
    return checkpoint.parent.parent / "evaluation" / name


def _describe(data: DataConfig) -> dict[str, object]:
    """Return the settings that determine an evaluation's images and labels."""
    values = {key: getattr(data, key) for key in _SEEN}
    described = {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
    if data.path is not None and os.path.exists(data.path):
        described["path"] = os.path.abspath(data.path)
    return described
