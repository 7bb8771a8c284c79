"""Pictures of a run."""

import json
from pathlib import Path


def draw_curves(metrics_file: Path, picture: Path) -> None:
    """Draw loss and validation accuracy over the steps from `metrics.jsonl` into a PNG.

    Args:
        metrics_file: the run's `metrics.jsonl`.
        picture: where to write.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    # A run that was stopped and went on may have logged a step twice: the later line stands.
    curves = {
        split: {row["step"]: row for row in rows if row["split"] == split and row["loss"] is not None}
        for split in ("train", "val")
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split, colour, style in (("train", "#4477aa", "-"), ("val", "#cc6677", "o-")):
        points = [curves[split][step] for step in sorted(curves[split])]
        if not points:
            continue
        steps = [row["step"] for row in points]
        loss.plot(steps, [row["loss"] for row in points], style, color=colour, markersize=4, label=split)
        if "top1" in points[0]:
            label = split if split == "train" else f"val, last {points[-1]['top1']:.4f}"
            accuracy.plot(steps, [row["top1"] for row in points], style, color=colour, markersize=4, label=label)
    for axes, title in ((loss, "loss"), (accuracy, "top-1 accuracy")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_yscale("log")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
