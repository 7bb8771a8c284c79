"""How a sweep is run."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Sampler(Enum):
    """What chooses the values of a sweep: every combination, or Optuna's tree-structured Parzen estimator."""

    grid = "grid"
    optuna = "optuna"


class Pruner(Enum):
    """Which runs of a sampler are stopped early: none, or those that are worse than the median of the others."""

    median = "median"
    none = "none"


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run.

    Attributes:
        dir: its folder; None takes multirun/NAME.
        parallel: runs that train at the same time.
        sampler: what chooses the values.
        trials: number of runs that the sampler chooses.
        seed: of the sampler.
        pruner: which runs of the sampler are stopped early.
        list_only: whether the runs are only listed.
    """

    dir: Path | None = None
    parallel: int = 1
    sampler: Sampler = Sampler.grid
    trials: int | None = None
    seed: int = 0
    pruner: Pruner = Pruner.median
    list_only: bool = False
