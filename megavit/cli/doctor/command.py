"""`megavit doctor`: check whether training can start on this machine; exit code 3 if it cannot.

Nothing here imports torch or Megatron-Core: that they are broken is why people call it.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megavit.cli.doctor.arguments import DoctorArgs
from megavit.cli.doctor.disk import check_disk
from megavit.cli.doctor.environment import check_settings, check_tools
from megavit.cli.doctor.finding import Finding, State, in_a_line
from megavit.cli.doctor.isolated import CHECKS, run_in_subprocess
from megavit.cli.doctor.ranks import check_network
from megavit.cli.doctor.report import Report
from megavit.cli.doctor.versions import check_versions
from megavit.runtime.output import check_writable, complete_file

Network = Callable[[list[Finding]], list[Finding]]


def doctor(args: DoctorArgs) -> int:
    """Check this machine.

    Returns:
        3 if something is broken, so that training could not start; else 0.

    Raises:
        ConfigError: if `out` cannot be written.
    """
    return examine(args, network=lambda before: check_network(args.ranks, before, timeout_s=args.timeout_s))


def examine(args: DoctorArgs, *, network: Network) -> int:
    """Look at everything, show it, and leave it as JSON where that is asked for.

    Args:
        args: the arguments.
        network: gives the network's findings, from those before it.

    Returns:
        The exit code.
    """
    file = _open(args.out)
    report = Report(None if args.out == "-" else _printer())
    report.add(_guarded("versions", check_versions))
    for _, findings in itertools.groupby(run_in_subprocess(list(CHECKS)), key=lambda finding: finding.section):
        report.add(list(findings))
    report.add(_guarded("disk", lambda: check_disk(args.run_dir)))
    report.add([*_guarded("settings", check_settings), *_guarded("launchers", check_tools)])
    # Last: whoever has started ranks hands his signals on to them.
    report.add(_guarded("network", lambda: network(report.findings)))
    report.close()
    if args.out == "-":
        print(report.to_json())
    elif file is not None:
        with complete_file(file) as temporary:
            temporary.write_text(report.to_json() + "\n")
    return report.code


def _guarded(section: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check's findings; what it raises is one."""
    try:
        return check()
    except Exception as error:
        return [Finding(section, section, State.broken, f"could not be looked at: {in_a_line(error)}")]


def _open(out: str | None) -> Path | None:
    """The file for JSON, seen to be writable before anything takes time."""
    if out in (None, "-"):
        return None
    assert out is not None
    check_writable(Path(out))
    return Path(out)


def _printer() -> Callable[..., None]:
    try:
        from rich.console import Console
    except ImportError:
        return print
    return partial(Console().print, highlight=False, markup=False)
