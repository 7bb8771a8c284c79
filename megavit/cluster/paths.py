"""Translate the paths of a run's folders for a job that shares no file system with this machine."""

import re

from megavit.cluster.job import Job
from megavit.config.overrides import key_of, write_text
from megavit.data.sources.registry import SOURCES
from megavit.data.sources.remote import is_url

# Prefix and path of an init_from that names files.
_INIT_FROM = re.compile(r"(ema:|mae:|nemo:)?(.*)", re.S)
_FROM_A_HUB = ("hf:", "timm:")
# Default parent folder of runs; init_from=runs/OTHER names another run.
RUNS = "runs/"


def own_data_path(job: Job) -> str | None:
    """Return data.path if it names files that the job's machines must have; None for an id, a URL or no path."""
    data = job.config.data
    if data.path is None or is_url(data.path):
        return None
    # A user-defined source reads files.
    return data.path if data.source not in SOURCES or SOURCES[data.source].is_local else None


def local_init_from(job: Job) -> tuple[str, str] | None:
    """Return prefix and path of an init_from that names files; None for another library's id or a URL."""
    weight_source = job.config.init_from
    if weight_source is None or weight_source.startswith(_FROM_A_HUB) or is_url(weight_source):
        return None
    match = _INIT_FROM.fullmatch(weight_source)
    assert match is not None
    return match[1] or "", match[2]


def with_settings(job: Job, changed: dict[str, str]) -> list[str]:
    """Return the run's settings, with some values replaced.

    Args:
        job: the run.
        changed: new values by setting.
    """
    remaining = [text for text in job.overrides if key_of(text) not in changed]
    return [*remaining, *(write_text(key, value) for key, value in changed.items())]
