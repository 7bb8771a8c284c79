"""A run's folders under the names that a job sees, where it shares no file system with this machine."""

import re

from megavit.cluster.job import Job
from megavit.config.overrides import key_of, write_text
from megavit.data.sources.registry import SOURCES
from megavit.data.sources.remote import is_url

# What stands before a place in init_from; after the second group it may be an id of a hub.
_DONOR = re.compile(r"(ema:|mae:|nemo:)?(.*)", re.S)
_FROM_A_HUB = ("hf:", "timm:")
# Beneath it a run lies where none says otherwise, and init_from=runs/OTHER finds another.
RUNS = "runs/"


def own_data_path(job: Job) -> str | None:
    """data.path where it names files that the job's machines must have; None for an id, a URL or no path."""
    data = job.config.data
    if data.path is None or is_url(data.path):
        return None
    # A user's own source reads files.
    return data.path if data.source not in SOURCES or SOURCES[data.source].is_local else None


def local_init_from(job: Job) -> tuple[str, str] | None:
    """What init_from names on a disk: what stands before it, and the path; None for another library's id or a URL."""
    weight_source = job.config.init_from
    if weight_source is None or weight_source.startswith(_FROM_A_HUB) or is_url(weight_source):
        return None
    match = _DONOR.fullmatch(weight_source)
    assert match is not None
    return match[1] or "", match[2]


def with_settings(job: Job, changed: dict[str, str]) -> list[str]:
    """The run's settings as typed, but for some that have another value there.

    Args:
        job: whose settings.
        changed: values by key.
    """
    remaining = [text for text in job.overrides if key_of(text) not in changed]
    return [*remaining, *(write_text(key, value) for key, value in changed.items())]
