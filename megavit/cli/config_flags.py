"""Flags of the commands that compose the configuration of a run."""

from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import argument
from megavit.config.show_flags import Part, Topic
from megavit.errors import ConfigError


@dataclass(frozen=True)
class ConfigFlags:
    """Flags that say where a configuration is composed from, and those that show it and start nothing.

    Attributes:
        config_dir: folder of your own configurations, with the groups as folders (model/my_vit.yaml); may be repeated.
        config_name: configuration to begin with, in place of train.
        start_time: what ${now:…} reads, in ISO format; without it the clock.
        cfg: print the configuration and start nothing: the run's (job), Hydra's own, or all; without a value job.
        resolve: with --cfg, print values in place of interpolations such as ${run.name}.
        package: with --cfg, print the node at this path alone, such as model.
        info: print where the configuration comes from and start nothing; without a value all.
    """

    config_dir: Path | None = argument(None, key="--config-dir", short="-cd", form="DIR", is_setting=True)
    config_name: str | None = argument(None, key="--config-name", short="-cn", form="NAME", is_setting=True)
    start_time: str | None = argument(None, key="--start-time", form="TIME", is_setting=True)
    cfg: Part | None = argument(None, key="--cfg", short="-c", bare=Part.job)
    resolve: bool = argument(False, key="--resolve")
    package: str | None = argument(None, key="--package", short="-p", form="PATH")
    info: Topic | None = argument(None, key="--info", short="-i", bare=Topic.all)

    @property
    def only_shows(self) -> bool:
        """Whether the configuration is shown and nothing is started."""
        return self.cfg is not None or self.info is not None

    def check(self) -> None:
        """Raise ConfigError for a flag that would be ignored."""
        if self.cfg is None and (self.resolve or self.package is not None):
            flag = "--resolve" if self.resolve else "--package"
            raise ConfigError(f"{flag} says how --cfg prints the configuration: add --cfg")
        if self.cfg is not None and self.info is not None:
            raise ConfigError("--cfg and --info print different things: type one of them")


def show_configuration(flags: ConfigFlags, settings: list[str]) -> None:
    """Print what `--cfg` or `--info` names.

    Args:
        flags: the flags as typed.
        settings: the settings as typed.

    Raises:
        ConfigError: for a setting that is wrong.
    """
    from megavit.config.compose import compose_with_sources
    from megavit.config.show import config_text, print_info

    composition = compose_with_sources(settings)
    if flags.info is not None:
        print_info(composition, flags.info)
    elif flags.cfg is not None:
        text = config_text(composition, part=flags.cfg, resolve=flags.resolve, package=flags.package)
        print(text, end="")
