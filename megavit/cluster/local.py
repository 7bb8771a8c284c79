"""Run a job on this machine with torchrun, in the foreground (`cluster=local`)."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from megavit.cluster.backend import Submitted
from megavit.cluster.config import ClusterConfig, LocalConfig
from megavit.cluster.job import Job
from megavit.cluster.render import render_shell


class Local:
    """This machine."""

    config_class: ClassVar[type[ClusterConfig]] = LocalConfig
    file_name: ClassVar[str] = "job.sh"

    def __init__(self, config: ClusterConfig) -> None:
        assert isinstance(config, LocalConfig)
        self.config: ClusterConfig = config

    def render(self, job: Job) -> str:
        """Render a script that runs the job."""
        return render_shell(
            "local.sh.j2",
            {
                "workdir": Path.cwd(),
                "device": job.device,
                "env": self.config.env,
                "settings": job.overrides,
                "python": self.config.python or sys.executable,
                "ranks": job.ranks_per_node,
            },
        )

    def try_out(self, texts: list[str]) -> None:
        """Do nothing: this machine accepts every job."""

    def submit(self, file: Path, job: Job) -> Submitted:
        """Run the script to its end; its exit code is the run's."""
        return Submitted(job.name, code=_run(["bash", str(file)]))

    def take_back(self, submitted: Submitted) -> None:
        """Do nothing: the job has already run."""


def _run(command: list[str]) -> int:
    """Run a command to its end and forward signals to it."""
    child = subprocess.Popen(command)
    # The terminal itself sends Ctrl-C to the command.
    earlier = {signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None)}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        earlier[number] = signal.signal(number, lambda number, frame: child.send_signal(number))
    try:
        return child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
