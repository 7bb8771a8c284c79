"""A run's folders under the names that a job sees, where it shares no file system with this machine."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser

from megavit.cluster.job import Job
from megavit.data.remote import is_url

# What stands before a place in init_from; after the second group it may be an id of a hub.
_DONOR = re.compile(r"(ema:|mae:|nemo:)?(.*)", re.S)
_FROM_A_HUB = ("hf:", "timm:")
# Beneath it a run lies where none says otherwise, and init_from=runs/OTHER finds another.
RUNS = "runs/"


def own_data_path(job: Job) -> str | None:
    """data.path where it names files that the job's machines must have; None for an id, a URL or no path."""
    data = job.config.data
    return None if data.path is None or data.source == "hub" or is_url(data.path) else data.path


def own_donor(job: Job) -> tuple[str, str] | None:
    """What init_from names on a disk: what stands before it, and the path; None for another library's id or a URL."""
    donor = job.config.init_from
    if donor is None or donor.startswith(_FROM_A_HUB) or is_url(donor):
        return None
    match = _DONOR.fullmatch(donor)
    assert match is not None
    return match[1] or "", match[2]


def with_settings(job: Job, changed: dict[str, str]) -> list[str]:
    """The run's settings as typed, but for some that have another value there.

    Args:
        job: whose settings.
        changed: values by key.
    """
    parser = OverridesParser.create()
    kept = [text for text in job.overrides if parser.parse_override(text).key_or_group not in changed]
    return [*kept, *(_setting(key, value) for key, value in changed.items())]


def _setting(key: str, value: str) -> str:
    """A value as Hydra reads it in quotes: backslashes count only before a quote."""
    if re.fullmatch(r"[\w./-]+", value) and not re.fullmatch(r"(?i)null|true|false|nan|inf|[\d._+e-]*", value):
        return f"{key}={value}"
    inside = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), value)
    return f'{key}="{inside}"'
