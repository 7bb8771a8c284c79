"""A stage for a rendered script: the cluster's commands are played, and note how they were called."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Notes its words; then does what the stage says it shall.
_PLAYER = """\
#!{python}
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
acts = json.loads(Path({acts!r}).read_text())
if name in acts:
    os.execvp("bash", ["bash", "-c", acts[name], name, *sys.argv[1:]])
"""


@dataclass
class Played:
    """How a script ended.

    Attributes:
        code: its exit code.
        output: what it said.
        calls: every call of a played command, its name first.
    """

    code: int
    output: str
    calls: list[list[str]]

    def of(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Stage:
    """A folder of played commands, put before all others on the path."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._calls, self._acts, self._bin = folder / "calls.jsonl", folder / "acts.json", folder / "bin"
        self._bin.mkdir(parents=True)
        self._acts.write_text("{}")
        for name in names:
            player = self._bin / name
            player.write_text(_PLAYER.format(python=sys.executable, calls=str(self._calls), acts=str(self._acts)))
            player.chmod(player.stat().st_mode | stat.S_IEXEC)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self._bin}:{os.environ['PATH']}"}

    def play(self, script: str, *, folder: Path, environment: dict[str, str] | None = None, **acts: str) -> Played:
        """Run a script.

        Args:
            script: its text.
            folder: where it is started.
            environment: variables in addition to this process's.
            acts: what a played command does, by its name: a line of bash.
        """
        self._acts.write_text(json.dumps(acts))
        self._calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-s"],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=folder,
            env={**self.environment, **(environment or {})},
        )
        calls = [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []
        return Played(done.returncode, done.stdout + done.stderr, calls)
