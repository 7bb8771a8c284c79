"""A Slurm of two nodes on this machine, for every test that asks for `slurm`; shared by pytest's processes."""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = Path("/run/megavit-slurm")
# What tests/cluster/slurm/start leaves with where there can be none.
NOT_HERE = 77


@dataclass(frozen=True)
class Slurm:
    """The one that `start` has started."""

    nodes: tuple[str, ...] = ("megavit-node1", "megavit-node2")

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to find it, and that is no part of a job itself."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**own, "SLURM_CONF": str(FOLDER / "slurm.conf")}

    def run(self, *command: str, timeout_s: float = 30) -> subprocess.CompletedProcess:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=self.environment)

    def job(self, number: str) -> dict[str, str]:
        """Return the values of `scontrol show job`, such as JobState, Restarts and ExitCode."""
        output = self.run("scontrol", "--oneliner", "show", "job", number)
        assert output.returncode == 0, output.stderr
        return dict(word.split("=", 1) for word in output.stdout.split() if "=" in word)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Start it; the last process that uses it stops it.

    A lock is given up by a killed process too, so a count of users would be wrong where the locks are right.
    """
    if os.geteuid() != 0:
        pytest.skip("no Slurm here: starting one needs root")
    with open("/run/megavit-slurm.gate", "w") as gate, open("/run/megavit-slurm.users", "w") as users:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        started = subprocess.run([HERE / "start", FOLDER], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        fcntl.flock(gate, fcntl.LOCK_UN)
        if started.returncode == NOT_HERE:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield Slurm()
        fcntl.flock(gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        subprocess.run([HERE / "stop", FOLDER], check=True, timeout=60)
