"""`megavit predict from=RUN images=PATH`: names and probabilities for images of one's own."""

import csv
import json
import sys
from pathlib import Path

import torch

from megavit.checks import whole_number
from megavit.data.files import find_images
from megavit.errors import ConfigError
from megavit.task.config import Loss
from megavit.trained import open_run, read_classes, read_run, split_settings, with_settings
from megavit.verb_arguments import parse_arguments

_AT_ONCE = 64


def predict(arguments: list[str]) -> int:
    """Classify images and write a row for each.

    Args:
        arguments: `from=RUN images=PATH`, and optionally `out=FILE.csv|FILE.jsonl top=5`; without `out` to the console.
            data.mean, data.std, data.eval_crop and data.interpolation may be others than the run's.

    Raises:
        ConfigError: if the run is no classifier's, or the images cannot be read.
    """
    pixels, own = split_settings(arguments)
    given = parse_arguments("predict", own, needed=("from", "images"), optional=("out", "top"))
    weights, config = read_run(given["from"], classifies=True, does="predicts")
    config = with_settings(config, pixels)
    classes = read_classes(weights.checkpoint)
    top = min(whole_number("top", given.get("top", "5")), len(classes))
    out = Path(given["out"]) if "out" in given else None
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"out={out} must end in .csv or .jsonl")
    paths = find_images(Path(given["images"]))
    trained = open_run(config, weights, num_classes=len(classes))
    rows = []
    for first in range(0, len(paths), _AT_ONCE):
        some = paths[first : first + _AT_ONCE]
        with torch.no_grad():
            logits, _ = trained.network.task.forward(trained.batch(some), trained.network.chunks["model"])
        # Trained with binary cross-entropy, each class has a probability of its own.
        chances = logits.sigmoid() if config.task.loss is Loss.bce else logits.softmax(dim=1)
        best = chances.topk(top, dim=1)
        for path, scores, labels in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            guesses = [{"class": classes[k], "probability": p} for k, p in zip(labels, scores, strict=True)]
            rows.append({"image": str(path), "guesses": guesses})
    _write(rows, out, top)
    return 0


def _write(rows: list[dict], out: Path | None, top: int) -> None:
    if out is not None and out.suffix == ".jsonl":
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file = out.open("w", newline="") if out is not None else sys.stdout
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", *(name for k in range(1, top + 1) for name in (f"class_{k}", f"probability_{k}"))])
        for row in rows:
            cells = [cell for guess in row["guesses"] for cell in (guess["class"], f"{guess['probability']:.6f}")]
            writer.writerow([row["image"], *cells])
        if out is not None:
            file.close()
    if out is not None:
        print(f"{out}: {len(rows)} images")
