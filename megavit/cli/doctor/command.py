"""Check whether training can start on this machine; exit with 3 if it cannot (`megavit doctor`).

This process imports neither torch nor Megatron-Core, because the command must work when they are broken.
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
        The exit code: 3 if something is broken, so that training cannot start; else 0.

    Raises:
        ConfigError: if `out` cannot be written.
    """
    return examine(args, network=lambda before: check_network(args.ranks, before, timeout_s=args.timeout_s))


def examine(args: DoctorArgs, *, network: Network) -> int:
    """Run all checks, print the findings, and write them as JSON if `out` is given.

    Args:
        args: the command's arguments.
        network: returns the network's findings, given all earlier findings.

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
    # The network comes last, because it starts ranks, and from then on this process forwards its signals to them.
    report.add(_guarded("network", lambda: network(report.findings)))
    report.close()
    if args.out == "-":
        print(report.to_json())
    elif file is not None:
        with complete_file(file) as temporary:
            temporary.write_text(report.to_json() + "\n")
    return report.code


def _guarded(section: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return a check's findings; an exception becomes a finding."""
    try:
        return check()
    except Exception as error:
        return [Finding(section, section, State.broken, f"cannot be checked: {in_a_line(error)}")]


def _open(out: str | None) -> Path | None:
    """Return the file for JSON, after checking that it can be written."""
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
