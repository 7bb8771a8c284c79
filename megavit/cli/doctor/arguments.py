"""Define the arguments of `megavit doctor`."""

from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import argument
from megavit.errors import ConfigError

# The parent of all runs' folders, checked if no run is named.
_RUNS = Path("runs")


@dataclass(frozen=True)
class DoctorArgs:
    """The command's own arguments.

    Attributes:
        ranks: number of processes to start; without it as many as training starts.
        dir: the run's folder, which must be writable.
        name: the run's name, instead of its folder.
        timeout_s: seconds that ranks may wait for each other.
        out: file for the findings as JSON; - prints JSON instead of the table.
    """

    ranks: int | None = argument(None, key="run.ranks", form="N")
    dir: Path | None = argument(None, key="run.dir", form="FOLDER")
    name: str | None = argument(None, key="run.name", form="NAME")
    timeout_s: int = argument(60, key="run.timeout_s")
    out: str | None = argument(None, form="FILE.json|-")

    @property
    def run_dir(self) -> Path:
        """Return the folder to write to."""
        return self.dir or (_RUNS / self.name if self.name is not None else _RUNS)

    def check(self) -> None:
        """Raise ConfigError if arguments exclude each other."""
        if self.dir is not None and self.name is not None:
            raise ConfigError(f"run.name={self.name} would be ignored: run.dir={self.dir} is given; give one of them")
        if self.name is not None and (self.name in (".", "..") or "/" in self.name):
            raise ConfigError(f"run.name={self.name!r} must be a word without a slash; run.dir takes a path")

    def check_under_launcher(self) -> None:
        """Raise ConfigError if an argument would be ignored because another launcher has started the ranks."""
        if self.ranks is not None:
            raise ConfigError(
                f"run.ranks={self.ranks} would be ignored: another launcher has started the ranks; remove it"
            )
