"""From the command line to a RunConfig: Hydra composes, we say what is wrong with it in one line."""

import difflib
import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavit.config import RunConfig
from megavit.errors import ConfigError

# Of each pair one is null; to override one clears the other.
_EITHER_OR = (("train.steps", "train.epochs"), ("optim.lr", "optim.base_lr"))

# Resolved by `megavit.auto_model`, before a configuration is composed.
AUTO_MODEL = "model=auto"


def config_dir() -> Path:
    """The folder of YAML files, in the repository or in the installed package."""
    return Path(str(files("megavit.conf").joinpath("train.yaml"))).parent


def choices(group: str) -> list[str]:
    """What can be chosen for a group, `model` or `recipe` for example."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    """The groups one can choose from; `cluster` is megavit submit's alone."""
    folders = (path for path in config_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return sorted(path.name for path in folders if path.name != "cluster")


def compose(overrides: list[str]) -> RunConfig:
    """Compose the configuration of a run.

    Args:
        overrides: Hydra's `key=value`, as typed.

    Raises:
        ConfigError: for a key or choice that is not there (the nearest one is named), or a value of a wrong type.
    """
    parsed = _parse(overrides)
    for override in parsed:
        _check_key(override)
    typed = {override.key_or_group for override in parsed}
    cleared = [
        f"{loser}=null"
        for pair in _EITHER_OR
        for winner, loser in (pair, pair[::-1])
        if winner in typed and loser not in typed
    ]
    # Hydra deletes a group's choice with a tilde; to a user, null says the same.
    given = ["~recipe" if text == "recipe=null" else text for text in overrides]
    if "recipe" not in typed and any(_is_other_data(override) for override in parsed):
        given.append("~recipe")
        if "data" not in typed:
            # Else the digits' one channel, mean and deviation would stay.
            given.append("data=folder")
    _register()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose("train", overrides=[*given, *cleared])
        OmegaConf.resolve(composed)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


@cache
def _register() -> None:
    """Let Hydra know the types of all settings; it keeps them for as long as the process lives."""
    ConfigStore.instance().store(name="run_config", node=RunConfig)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, as it is kept in the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> RunConfig:
    """Read what `to_yaml` wrote.

    Raises:
        ConfigError: if it does not fit this megavit's configuration.
    """
    if "${" in text:
        raise ConfigError(
            "a run's configuration holds ${…}, which is resolved before it is written; it was tampered with"
        )
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text)))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"a run's configuration cannot be read: {_explain(error)}") from error
    assert isinstance(config, RunConfig)
    return config


def merge(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Put settings over a configuration that a run has left.

    Args:
        config: the run's.
        overrides: `key=value`, as typed; a whole group cannot be chosen anew.

    Raises:
        ConfigError: for a key that is not there, or a value of a wrong type.
    """
    for override in _parse(overrides):
        if override.key_or_group in groups():
            example = {"data": f"data.source={override.value()}"}.get(override.key_or_group)
            hint = f", {example} for example" if example is not None else ""
            raise ConfigError(f"{override.input_line}: a run's groups are as they were; set single keys of them{hint}")
        _check_key(override)
    try:
        typed = OmegaConf.create({})
        for override in _parse(overrides):
            OmegaConf.update(typed, override.key_or_group, override.value())
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), typed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(merged, RunConfig)
    return merged


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted path."""
    found: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        path = f"{prefix}{part.name}"
        found |= leaves(value, f"{path}.") if is_dataclass(value) else {path: value}
    return found


def _parse(overrides: list[str]) -> list[Override]:
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"'{text}' is no setting: write key=value, for example train.steps=100")
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            raise ConfigError(
                f"'{text}' cannot be read ({str(error).splitlines()[0]}); a value with signs such as = or , goes in "
                f"quotes that the shell leaves: key='\"value\"'"
            ) from error
        if parsed[-1].is_sweep_override():
            raise ConfigError(f"'{text}' gives several values, and a run takes one; a list goes in brackets: key=[a,b]")
    return parsed


def _is_other_data(override: Override) -> bool:
    """Whether a setting chooses other data than the recipe that stands where none is typed, that of the digits."""
    chooses = override.key_or_group in ("data", "data.path")
    return chooses and override.value() not in ("digits", None)


def _check_key(override: Override) -> None:
    key = override.key_or_group
    known_groups = groups()
    if key in known_groups:
        value = override.value()
        if key == "recipe" and value is None:
            return
        if f"{key}={value}" == AUTO_MODEL:
            raise ConfigError(
                f"{AUTO_MODEL} is for megavit train and megavit submit, which read init_from's weights; choose one of "
                f"{', '.join(choices(key))}"
            )
        if not isinstance(value, str) or value not in choices(key):
            raise ConfigError(_unknown(f"{key}={value}", str(value), choices(key), form=f"{key}={{}}"))
        return
    known = list(leaves(RunConfig()))
    if key in known:
        return
    if key.partition(".")[0] == "cluster":
        raise ConfigError(f"{override.input_line} says where a job runs, which is read by megavit submit alone")
    if any(path.startswith(key + ".") for path in known):
        raise ConfigError(
            f"{override.input_line} sets a whole section; set its keys: "
            + ", ".join(path for path in known if path.startswith(key + "."))
        )
    raise ConfigError(_unknown(f"the setting {key}", key, [*known, *known_groups], form="{}"))


def _unknown(what: str, typed: str, known: list[str], *, form: str) -> str:
    near = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    if not near:
        # The last word alone, for `lr` where `optim.lr` was meant.
        near = [path for path in known if path.rsplit(".", 1)[-1] == typed.rsplit(".", 1)[-1]][:1]
    hint = f"did you mean {form.format(near[0])}?" if near else f"known: {', '.join(known)}"
    return f"{what} does not exist; {hint}"


def _explain(error: Exception) -> str:
    """The setting, the value and what was expected, out of Hydra's and OmegaConf's messages."""
    # OmegaConf's own message, at the bottom of the chain, names value and type; Hydra's above it names the file.
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text) or re.search(r"full_key: (\S+)", str(error))
    first = text.splitlines()[0]
    return f"{key.group(1)}: {first}" if key else first
