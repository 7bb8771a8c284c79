"""Define the interface of a cluster: render a job, submit it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from megavit.cluster.config import ClusterConfig
from megavit.cluster.job import Job


@dataclass(frozen=True)
class Submitted:
    """A job that a cluster has accepted.

    Attributes:
        job_id: the cluster's name or number of the job.
        lines: text for the user by label: where the log is, how to follow it, how to stop it.
        code: exit code of a job that has already ended.
    """

    job_id: str
    lines: dict[str, str] = field(default_factory=dict)
    code: int = 0


class Backend(Protocol):
    """A kind of cluster.

    Attributes:
        config_class: dataclass of the cluster's settings.
        file_name: name of the rendered file, in RUN/launch/.
        config: the cluster's checked settings.
    """

    config_class: ClassVar[type[ClusterConfig]]
    file_name: ClassVar[str]
    config: ClusterConfig

    def __init__(self, config: ClusterConfig) -> None: ...

    def render(self, job: Job) -> str:
        """Render the file that is submitted, as readable text.

        Raises:
            ConfigError: if this cluster cannot run the job.
        """
        ...

    def try_out(self, texts: list[str]) -> None:
        """Check with the cluster that it would accept every rendered job, without submitting anything.

        Raises:
            ConfigError: if it rejects a job, or cannot be reached.
        """
        ...

    def submit(self, file: Path, job: Job) -> Submitted:
        """Submit one job.

        Raises:
            ConfigError: if the cluster rejects the job; nothing of it is left there.
        """
        ...

    def take_back(self, submitted: Submitted) -> None:
        """Cancel a job that has just been submitted."""
        ...
