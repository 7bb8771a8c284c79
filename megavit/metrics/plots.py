"""Draw a run's curves, image grids, sample sheets and confusion matrix into PNG files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from megavit.metrics.rows import read_rows, without_repeated
from megavit.metrics.task_metric import TaskMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(metrics_file: Path, picture: Path, *, task_metrics: tuple[TaskMetric, ...]) -> None:
    """Draw the loss and a metric of the task over the steps from `metrics.jsonl` into a PNG.

    Args:
        metrics_file: the run's `metrics.jsonl`.
        picture: the PNG to write.
        task_metrics: metrics of the task; the first one that the run reports is drawn.
    """
    figure = curves_figure(metrics_file, task_metrics=task_metrics)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def curves_figure(metrics_file: Path, *, task_metrics: tuple[TaskMetric, ...]) -> "Figure":
    """Return the figure that `draw_curves` writes; its arguments are those of `draw_curves`."""
    from matplotlib.figure import Figure

    rows = read_rows(metrics_file)
    curves = {split: _curve(rows, split) for split in ("train", "val")}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, result = figure.subplots(1, 2)
    title = ""
    falling: list[tuple[int, float]] = []
    for split, colour, style in (("train", "#4477aa", "-"), ("val", "#cc6677", "o-")):
        points = curves[split]
        if not points:
            continue
        steps = [row["step"] for row in points]
        loss.plot(steps, [row["loss"] for row in points], style, color=colour, markersize=4, label=split)
        metric = next((metric for metric in task_metrics if metric.name in points[0]), None)
        if metric is None:
            continue
        # A value that was not finite is null in the file.
        found = {row["step"]: row[metric.name] for row in points if row[metric.name] is not None}
        if found:
            title = metric.title
            label = split if split == "train" else f"val, last {list(found.values())[-1]:.4f}"
            result.plot(list(found), list(found.values()), style, color=colour, markersize=4, label=label)
            if not metric.higher:
                falling += found.items()
    for axes, name in ((loss, "loss"), (result, title)):
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    loss.set_yscale("log")
    _label_log_axis(loss)
    _leave_the_start_out(result, falling)
    return figure


def _curve(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Return one split's lines that have a loss."""
    return [row for row in without_repeated(rows, split) if row["loss"] is not None]


def _label_log_axis(axes: "Axes") -> None:
    """Label 1, 2, 5, 10, 20 …; if the axis contains at most one of these, matplotlib spaces the labels evenly."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _leave_the_start_out(axes: "Axes", points: list[tuple[int, float]]) -> None:
    """End the axis above the values that follow the first point and the first tenth of the steps."""
    steps = [step for step, _ in points]
    if len(set(steps)) < 2:
        return
    start = max(min(steps), max(steps) / 10)
    low, high = min(value for _, value in points), max(value for step, value in points if step > start)
    margin = 0.05 * (high - low) or 0.05 * high
    axes.set_ylim(low - margin, high + margin)


def plot_image_grid(image_grid: Tensor, *, titles: tuple[str, ...], path: Path) -> np.ndarray:
    """Draw a titled row per panel and a column per image into a PNG.

    Args:
        image_grid: uint8 [image, panel, channel, row, column]; unless there are 3 channels, the first is shown in grey.
        titles: titles of the rows.
        path: the PNG to write.

    Returns:
        The picture, uint8 [row, column, RGB].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows, channels, height, width = image_grid.shape
    side = 1.15
    figure = Figure(figsize=(side * columns + 0.3, side * rows * height / width), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    images = image_grid.permute(0, 1, 3, 4, 2).cpu().numpy()
    for row in range(rows):
        for column in range(columns):
            image, axes = images[column, row], grid[row][column]
            axes.imshow(image if channels == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        grid[row][0].set_ylabel(titles[row], fontsize=9)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return picture


def draw_samples(rows: dict[str, list[Tensor]], *, captions: dict[str, list[str]], path: Path) -> None:
    """Draw samples into a PNG: at most eight per line, the rows of each sample below one another.

    Args:
        rows: an image of each sample by the row's title: uint8 image_CYX of any size; unless there are 3 channels, the
            first is shown in grey.
        captions: for some rows, the text above each sample's image.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    count = len(next(iter(rows.values())))
    columns = min(8, count)
    lines = -(-count // columns)
    close = ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.03, hspace=0.0, wspace=0.0)
    figure = Figure(figsize=(1.5 * columns + 0.5, 1.8 * lines * len(rows) + 0.2), layout=close, dpi=110)
    grid = figure.subplots(lines * len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for place, (title, images) in enumerate(rows.items()):
        for index, image in enumerate(images):
            line, column = divmod(index, columns)
            axes = grid[line * len(rows) + place][column]
            pixels = image.permute(1, 2, 0).cpu().numpy()
            axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
            if title in captions:
                axes.set_title(captions[title][index], fontsize=7, pad=3)
            if column == 0:
                axes.set_ylabel(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_confusion(confusion: Tensor, *, classes: tuple[str, ...], path: Path) -> None:
    """Draw a confusion matrix into a PNG; each row shows fractions of a label's images.

    Args:
        confusion: number of images, int64 [label, prediction].
        classes: class names; drawn if there are at most 40.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    shares = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    named = len(classes) <= 40
    side = max(4.0, min(10.0, 0.35 * len(classes) + 2)) if named else 10.0
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="guess", ylabel="label")
    if named:
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90, fontsize=8)
        axes.set_yticks(places, classes, fontsize=8)
        for label, guess in zip(*shares.nonzero(), strict=True):
            colour = "white" if shares[label, guess] > 0.5 else "black"
            axes.text(
                guess, label, str(int(confusion[label, guess])), ha="center", va="center", color=colour, fontsize=7
            )
    figure.savefig(path, dpi=110)
