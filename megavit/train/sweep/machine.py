"""Divide this machine among the runs of a sweep that train at the same time."""

import os
from dataclasses import dataclass

from megavit.config.experiment import ExperimentConfig
from megavit.errors import ConfigError
from megavit.runtime.workers import num_ranks


@dataclass(frozen=True)
class Slot:
    """A run's part of this machine.

    Attributes:
        gpus: names of its GPUs, as in CUDA_VISIBLE_DEVICES; None takes the machine as it is.
        cores: CPU cores that its ranks share; None takes the machine as it is.
    """

    gpus: tuple[str, ...] | None = None
    cores: int | None = None

    def num_ranks(self, config: ExperimentConfig) -> int:
        """Return the number of ranks that a run starts here.

        Raises:
            ConfigError: if it needs more GPUs than it gets.
        """
        if self.gpus is None:
            return num_ranks(config)
        ranks = config.run.ranks or len(self.gpus)
        if ranks > len(self.gpus):
            raise ConfigError(
                f"run.ranks={ranks} is more than the {len(self.gpus)} GPUs that sweep.parallel leaves to each run; "
                f"lower sweep.parallel or run.ranks"
            )
        return ranks

    def environment(self, ranks: int) -> dict[str, str]:
        """Return the variables that keep a run within its part; a number of threads that the user set stays."""
        if self.gpus is not None:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        if self.cores is None or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, self.cores // ranks))}


def divide_machine(parallel: int) -> list[Slot]:
    """Return the parts of this machine, one for each of the runs that train at the same time.

    Args:
        parallel: number of runs; one gets the machine as it is.

    Raises:
        ConfigError: if there are fewer GPUs than runs.
    """
    if parallel == 1:
        return [Slot()]
    gpus = _visible_gpus()
    if not gpus:
        return [Slot(cores=max(1, len(os.sched_getaffinity(0)) // parallel))] * parallel
    each = len(gpus) // parallel
    if not each:
        raise ConfigError(f"sweep.parallel={parallel} is more than the {len(gpus)} GPUs here; a GPU takes one run")
    return [Slot(gpus=tuple(gpus[index * each : (index + 1) * each])) for index in range(parallel)]


def _visible_gpus() -> list[str]:
    from megavit.parallel.cpu_backend import run_on_cpu

    if run_on_cpu():
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
