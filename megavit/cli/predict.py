"""Predict class names and probabilities of images (`megavit predict from=RUN images=PATH`)."""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TextIO

from megavit.cli.arguments import argument
from megavit.data.config import PIXEL_SETTINGS
from megavit.data.sources.image_files import find_images
from megavit.errors import ConfigError
from megavit.inference.predict import Classifier, Prediction
from megavit.runtime.output import check_writable, complete_file


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
    classifier, out = Classifier(args.from_, settings), args.out
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"out={out} must end in .csv or .jsonl")
    if out is not None:
        check_writable(out)
    paths = find_images(args.images)
    rows, unread = [], list[ConfigError]()
    for result in classifier.classify(paths, top=args.top):
        if isinstance(result, Prediction):
            rows.append(result)
            continue
        unread.append(result)
        if len(paths) > 1:
            print(f"megavit: {result}", file=sys.stderr)
    if len(paths) == 1 and unread:
        raise unread[0]
    if rows:
        _write(rows, out, min(args.top, len(classifier.classes)))
    if unread:
        others = f"; {out or 'the output'} has the other {len(rows):,}" if rows else ""
        raise ConfigError(f"{len(unread):,} of {len(paths):,} images could not be read, see above{others}")
    return 0


def _write(rows: list[Prediction], out: Path | None, top: int) -> None:
    if out is None:
        _write_csv(rows, sys.stdout, top)
        return
    with complete_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if out.suffix == ".jsonl":
            file.writelines(json.dumps({"image": row.path, "guesses": _guesses(row)}) + "\n" for row in rows)
        else:
            _write_csv(rows, file, top)
    print(f"{out}: {len(rows)} images")


def _guesses(row: Prediction) -> list[dict[str, str | float]]:
    return [{"class": name, "probability": p} for name, p in zip(row.classes, row.probabilities, strict=True)]


def _write_csv(rows: list[Prediction], file: TextIO, top: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", *(name for k in range(1, top + 1) for name in (f"class_{k}", f"probability_{k}"))])
    for row in rows:
        guesses = zip(row.classes, row.probabilities, strict=True)
        writer.writerow([row.path, *(cell for name, p in guesses for cell in (name, f"{p:.6f}"))])
