"""How a task's metric appears on the console and in the curves, and in which direction it improves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskMetric:
    """A metric that a task reports beside its loss.

    Attributes:
        name: its key among the task's metrics.
        label: its name on the console, `top-1` for example.
        title: its name above the curve.
        format: of its value, `.4f` for example.
        higher: whether a larger value is better.
    """

    name: str
    label: str
    title: str
    format: str
    higher: bool


def console_formats(metrics: tuple[TaskMetric, ...]) -> dict[str, str]:
    """Return the console's format of each metric by name, and of its value with averaged weights as `ema_<name>`."""
    formats = {metric.name: f"{metric.label} {{:{metric.format}}}" for metric in metrics}
    return formats | {f"ema_{metric.name}": f"of the average {{:{metric.format}}}" for metric in metrics}
