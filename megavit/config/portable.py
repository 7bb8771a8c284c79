"""Write a configuration as overrides that need no file of the user's, for a job on another machine."""

from megavit.config.compose import compose, compose_with_sources
from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import key_of, write_setting
from megavit.config.settings import flatten


def make_portable(overrides: list[str]) -> list[str]:
    """Replace overrides that need the user's files, environment or clock by every setting that they lead to.

    Args:
        overrides: as for `compose`.

    Returns:
        The overrides as typed if they compose to the same configuration on every machine.

    Raises:
        ConfigError: as `compose` does.
    """
    composition = compose_with_sources(overrides)
    if not composition.files and not any("${" in text or text.startswith(("--", "hydra.")) for text in overrides):
        return overrides
    config = composition.config
    written = ["recipe=null", f"task={config.task.name}"]
    # A setting may change the default of another one: optim.warmup_steps that of optim.shorten_warmup.
    while different := _differences(compose(written), config):
        assert not {key_of(text) for text in written} & {key_of(text) for text in different}, different
        written += different
    return written


def _differences(before: ExperimentConfig, after: ExperimentConfig) -> list[str]:
    """Return the overrides that change the settings of one configuration to those of another."""
    old = flatten(before)
    return [write_setting(key, value) for key, value in flatten(after).items() if old.get(key) != value]
