"""Predict class names and probabilities of images (`megavit predict from=RUN images=PATH`)."""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TextIO

import torch

from megavit.cli.arguments import argument
from megavit.data.config import PIXEL_SETTINGS
from megavit.data.sources.image_files import find_images
from megavit.errors import ConfigError, printable
from megavit.inference.load import open_encoder
from megavit.inference.trained_run import read_classes, read_run, with_settings
from megavit.runtime.output import check_writable, complete_file
from megavit.task.config import ClassificationConfig, Loss

_AT_ONCE = 64


@dataclass(frozen=True)
class PredictArgs:
    """The command's own arguments.

    Attributes:
        from_: a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.
        images: an image, or a folder of images.
        out: file for the results, CSV or JSON lines; without it they are printed.
        top: number of most probable classes for each image.
    """

    SETTINGS: ClassVar = PIXEL_SETTINGS
    from_: str = argument(form="RUN")
    images: Path = argument(form="PATH")
    out: Path | None = argument(None, form="FILE.csv|FILE.jsonl")
    top: int = 5


def predict(args: PredictArgs, settings: list[str]) -> int:
    """Classify images and write a row for each; report images that cannot be read, and classify the others.

    Args:
        args: the command's own arguments.
        settings: `PIXEL_SETTINGS` that replace the run's, as `key=value`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if the run is not a classifier, or images cannot be read (after the others have been written).
    """
    weights, config = read_run(args.from_, classifies=True, does="predicts")
    config = with_settings(config, settings)
    classes = read_classes(weights.checkpoint)
    top, out = min(args.top, len(classes)), args.out
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"out={out} must end in .csv or .jsonl")
    if out is not None:
        check_writable(out)
    paths = find_images(args.images)
    encoder, layout = open_encoder(config, weights)
    model = encoder.to(layout.device)
    rows, unread = [], list[ConfigError]()
    for first in range(0, len(paths), _AT_ONCE):
        some, images = [], []
        for path in paths[first : first + _AT_ONCE]:
            try:
                images.append(model.read(path))
                some.append(path)
            except ConfigError as error:
                unread.append(error)
                if len(paths) > 1:
                    print(f"megavit: {error}", file=sys.stderr)
        if not images:
            continue
        with torch.no_grad():
            logits = model(torch.cat(images).to(layout.device))
        # A model trained with binary cross-entropy gives each class an independent probability.
        assert isinstance(config.task, ClassificationConfig)
        chances = logits.sigmoid() if config.task.loss is Loss.bce else logits.softmax(dim=1)
        best = chances.topk(top, dim=1)
        for path, scores, labels in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            guesses = [{"class": classes[k], "probability": p} for k, p in zip(labels, scores, strict=True)]
            rows.append({"image": printable(str(path)), "guesses": guesses})
    if len(paths) == 1 and unread:
        raise unread[0]
    if rows:
        _write(rows, out, top)
    if unread:
        others = f"; {out or 'the output'} has the other {len(rows):,}" if rows else ""
        raise ConfigError(f"{len(unread):,} of {len(paths):,} images could not be read, see above{others}")
    return 0


def _write(rows: list[dict], out: Path | None, top: int) -> None:
    if out is None:
        _write_csv(rows, sys.stdout, top)
        return
    with complete_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if out.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            _write_csv(rows, file, top)
    print(f"{out}: {len(rows)} images")


def _write_csv(rows: list[dict], file: TextIO, top: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", *(name for k in range(1, top + 1) for name in (f"class_{k}", f"probability_{k}"))])
    for row in rows:
        cells = [cell for guess in row["guesses"] for cell in (guess["class"], f"{guess['probability']:.6f}")]
        writer.writerow([row["image"], *cells])
