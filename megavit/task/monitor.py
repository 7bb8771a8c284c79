"""Which of a task's metrics says that one evaluation is better than another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MonitoredMetric:
    """A metric, and where it should go.

    Attributes:
        metric: its name among the task's metrics.
        higher: whether more of it is better.
    """

    metric: str
    higher: bool

    def is_better(self, found: dict[str, float], than: dict[str, float]) -> bool:
        """Whether an evaluation is better than the best one before; of runs with a moving average, the average's.

        Args:
            found: the metrics of the evaluation.
            than: those of the best one; empty where there is none yet.
        """
        name = f"ema_{self.metric}" if f"ema_{self.metric}" in found else self.metric
        # A missing one is worse than all, and so is NaN, with which no comparison holds.
        if name not in found or name not in than:
            return name in found and found[name] == found[name]
        return found[name] > than[name] if self.higher else found[name] < than[name]
