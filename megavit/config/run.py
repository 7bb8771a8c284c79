"""Section `run`: name, folder, seed and processes."""

from dataclasses import dataclass

from megavit.errors import ConfigError
from megavit.validation import require_number

_FOLDER = "runs/${run.name}"


@dataclass
class RunConfig:
    """Section `run`: name, folder, seed and processes.

    Attributes:
        name: the run's name; its folder follows from it, so that all ranks and every restart agree.
        dir: the run's folder.
        seed: seed of initial weights, data order, augmentation and dropout.
        ranks: processes that `megavit train` starts; null: one per GPU, without GPUs tp · pp.
        preflight: before training, run one step, one evaluation batch, one save and one load in the real layout; null
            does so where there are several ranks.
        timeout_s: seconds after which a collective fails that waits for a lost rank.
    """

    name: str = "run"
    dir: str = _FOLDER
    seed: int = 0
    ranks: int | None = None
    preflight: bool | None = None
    timeout_s: float = 600.0

    def check(self, world_size: int) -> None:
        """Raise ConfigError where this section contradicts itself or the number of ranks."""
        require_number("run", self, "ranks", at_least=1)
        # Megatron-Core counts its groups' time-out in whole minutes.
        require_number("run", self, "timeout_s", at_least=60)
        require_number("run", self, "seed", at_least=0)
        if self.ranks is not None and self.ranks != world_size:
            raise ConfigError(
                f"run.ranks={self.ranks} would be ignored: another launcher has started {world_size} ranks; remove "
                f"run.ranks"
            )
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"run.name={self.name!r} must be a word without a slash; run.dir takes a path")
        if not self.dir:
            raise ConfigError("run.dir is empty; remove it to take runs/NAME")


def default_folder(name: str) -> str:
    """Return the folder of a run of this name."""
    return _FOLDER.replace("${run.name}", name)
