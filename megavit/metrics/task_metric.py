"""Describe a task's metric: its names on the console and in the curves, and the direction in which it improves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskMetric:
    """A metric that a task reports in addition to its loss.

    Attributes:
        name: key among the task's metrics.
        label: name on the console, `top-1` for example.
        title: title of the curve.
        format: format of the value, `.4f` for example.
        higher: whether a larger value is better.
    """

    name: str
    label: str
    title: str
    format: str
    higher: bool


def console_formats(metrics: tuple[TaskMetric, ...]) -> dict[str, str]:
    """Return the console's format of each metric by name, and as `ema_<name>` that of its value with averaged weights.

    Args:
        metrics: metrics of the task.
    """
    formats = {metric.name: f"{metric.label} {{:{metric.format}}}" for metric in metrics}
    return formats | {f"ema_{metric.name}": f"of the average {{:{metric.format}}}" for metric in metrics}
