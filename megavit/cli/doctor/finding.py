"""Define a finding of `megavit doctor`: one line of its table."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class State(Enum):
    """The state of a finding: `ok`; `missing`: training starts without it; `broken`: training cannot start."""

    ok = "ok"
    missing = "missing"
    broken = "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        section: group of findings, such as versions.
        name: the thing that was checked.
        state: result of the check.
        text: description of the result.
        advice: what to install or to set if the state is not ok.
        figures: numbers behind the text, for JSON.
    """

    section: str
    name: str
    state: State
    text: str
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as a JSON object."""
        return {**asdict(self), "state": self.state.value}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Finding":
        """Return the finding that `to_json` wrote."""
        return cls(**{**found, "state": State(found["state"])})


def in_a_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def gib(count: float) -> str:
    """Format a number of bytes in GiB, or in MiB below 1 GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
