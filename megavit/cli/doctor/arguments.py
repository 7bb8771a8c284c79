"""What `megavit doctor` is asked."""

from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import parse_arguments
from megavit.errors import ConfigError
from megavit.validation import parse_int

# The parent of all runs' folders, where a run is not named.
_RUNS = Path("runs")
_TIMEOUT_S = 60


@dataclass(frozen=True)
class DoctorArgs:
    """The arguments.

    Attributes:
        ranks: to start; None for as many as training would.
        run_dir: the folder to write to.
        out: the file for JSON, - for standard output; None for none.
        timeout_s: seconds that ranks may wait for each other.
    """

    ranks: int | None
    run_dir: Path
    out: str | None
    timeout_s: int


def read_arguments(arguments: list[str], *, under_launcher: bool = False) -> DoctorArgs:
    """Read them.

    Args:
        arguments: as typed.
        under_launcher: whether another launcher has started the ranks.

    Raises:
        ConfigError: for one that is wrong.
    """
    optional = ("run.ranks", "run.dir", "run.name", "run.timeout_s", "out")
    args = parse_arguments("doctor", arguments, needed=(), optional=optional)
    empty = next((key for key, value in args.items() if not value), None)
    if empty is not None:
        raise ConfigError(f"{empty}= is empty; leave it away, or give it a value")
    if "run.dir" in args and "run.name" in args:
        raise ConfigError(
            f"run.name={args['run.name']} would be ignored: run.dir={args['run.dir']} says where; give one of them"
        )
    if "run.ranks" in args and under_launcher:
        raise ConfigError(
            f"run.ranks={args['run.ranks']} would be ignored: another launcher has started the ranks; leave it away"
        )
    name = args.get("run.name")
    if name is not None and (name in (".", "..") or "/" in name):
        raise ConfigError(f"run.name={name!r} must be a word without a slash; run.dir takes a path")
    default = _RUNS / name if name is not None else _RUNS
    return DoctorArgs(
        ranks=parse_int("run.ranks", args["run.ranks"]) if "run.ranks" in args else None,
        run_dir=Path(args["run.dir"]) if "run.dir" in args else default,
        out=args.get("out"),
        timeout_s=parse_int("run.timeout_s", args["run.timeout_s"]) if "run.timeout_s" in args else _TIMEOUT_S,
    )
