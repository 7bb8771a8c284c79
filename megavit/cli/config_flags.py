"""Flags of the commands that compose the configuration of a run."""

from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import argument


@dataclass(frozen=True)
class ConfigFlags:
    """Flags that say where a configuration is composed from.

    Attributes:
        config_dir: folder of your own configurations, with the groups as folders (model/my_vit.yaml); may be repeated.
        config_name: configuration to begin with, in place of train.
        start_time: what ${now:…} reads, in ISO format; without it the clock.
    """

    config_dir: Path | None = argument(None, key="--config-dir", short="-cd", form="DIR", is_setting=True)
    config_name: str | None = argument(None, key="--config-name", short="-cn", form="NAME", is_setting=True)
    start_time: str | None = argument(None, key="--start-time", form="TIME", is_setting=True)
