"""What the doctor says of one thing."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class State(Enum):
    """`ok`; `missing`: training starts without it; `broken`: training cannot start."""

    ok = "ok"
    missing = "missing"
    broken = "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        section: what it belongs to, such as versions.
        name: what was looked at.
        state: how it is.
        text: what was found.
        advice: what to install or to set, where something is not as it could be.
        figures: the numbers behind the text, for JSON.
    """

    section: str
    name: str
    state: State
    text: str
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "state": self.state.value}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Finding":
        """The finding that `to_json` wrote."""
        return cls(**{**found, "state": State(found["state"])})


def in_a_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def gib(count: float) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
