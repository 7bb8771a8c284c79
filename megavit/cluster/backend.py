"""What a cluster does with a job: render it, submit it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from megavit.cluster.config import ClusterConfig
from megavit.cluster.job import Job


@dataclass(frozen=True)
class Submitted:
    """A job that a cluster has taken.

    Attributes:
        job_id: by the cluster's own count.
        lines: what its user wants to know, by name: where the log is, how to follow it, how to stop it.
        code: its exit code, where it has already ended.
    """

    job_id: str
    lines: dict[str, str] = field(default_factory=dict)
    code: int = 0


class Backend(Protocol):
    """A kind of cluster.

    Attributes:
        config_class: its section of settings.
        file_name: of what is rendered, in RUN/launch/.
        config: its settings, checked.
    """

    config_class: ClassVar[type[ClusterConfig]]
    file_name: ClassVar[str]
    config: ClusterConfig

    def __init__(self, config: ClusterConfig) -> None: ...

    def render(self, job: Job) -> str:
        """What is submitted, as text that a person can read.

        Raises:
            ConfigError: if the job cannot be written down for this cluster.
        """
        ...

    def try_out(self, texts: list[str]) -> None:
        """Ask the cluster, without submitting anything, whether it would take all of what was rendered.

        Raises:
            ConfigError: if it would not, or cannot be reached.
        """
        ...

    def submit(self, file: Path, job: Job) -> Submitted:
        """Hand one over.

        Raises:
            ConfigError: if the cluster does not take it; nothing of it is left there.
        """
        ...

    def take_back(self, submitted: Submitted) -> None:
        """Cancel a job that has just been handed over."""
        ...
