"""Print the doctor's findings as a table, section by section, or as JSON."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from megavit.cli.doctor.finding import Finding, State
from megavit.runtime.run_dir import FINDINGS, FINISHED

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {State.ok: "green", State.missing: "yellow", State.broken: "bold red"}
# Widths of the longest state and the longest name.
_STATE_WIDTH, _NAME_WIDTH = 7, 18
_ADVICE = "\n→ "


class Report:
    """Collect findings and print them as they come.

    Args:
        show: prints a line of text or a table; None prints nothing.
    """

    def __init__(self, show: Callable[..., None] | None) -> None:
        self.findings: list[Finding] = []
        self._show = show

    @property
    def code(self) -> int:
        """Return the exit code: 3 if something is broken, so that training cannot start; else 0."""
        return FINDINGS if any(finding.state is State.broken for finding in self.findings) else FINISHED

    def add(self, findings: list[Finding]) -> None:
        """Add findings and print them, one table per section."""
        self.findings += findings
        if self._show is None:
            return
        for section in dict.fromkeys(finding.section for finding in findings):
            of_section = [finding for finding in findings if finding.section == section]
            try:
                self._show(_table(section, of_section))
                self._show("")
            except ImportError:
                # rich is not installed.
                for finding in of_section:
                    self._show(section, *_cells(finding), sep="  ")

    def close(self) -> None:
        """Print the conclusion."""
        if self._show is None:
            return
        broken = [finding.name for finding in self.findings if finding.state is State.broken]
        missing = sum(finding.state is State.missing for finding in self.findings)
        if broken:
            message = f"training cannot start: {', '.join(dict.fromkeys(broken))}"
        else:
            message = "training can start"
            if missing:
                message += f"; the missing parts ({missing}) are needed by some settings only"
        self._show(message)

    def to_json(self) -> str:
        """Return all findings as one JSON object."""
        found = [finding.to_json() for finding in self.findings]
        return json.dumps({"code": self.code, "findings": found}, indent=2)


def _table(section: str, findings: list[Finding]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=section, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(min_width=_STATE_WIDTH, no_wrap=True)
    table.add_column(min_width=_NAME_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        state, name, message = _cells(finding)
        text, *advice = message.split(_ADVICE)
        # Text, not markup: `megavit[te]` has brackets.
        found = Text(text).append("".join(_ADVICE + line for line in advice), style="dim")
        table.add_row(Text(state, style=_COLOURS[finding.state]), Text(name), found)
    return table


def _cells(finding: Finding) -> tuple[str, str, str]:
    needed = finding.advice and finding.state is not State.ok
    return finding.state.value, finding.name, finding.text + (_ADVICE + finding.advice if needed else "")
