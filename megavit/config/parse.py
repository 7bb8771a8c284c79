"""Parse the overrides of a command line and check their names."""

from megavit.config.overrides import Setting, key_of, list_items, read_setting, read_text
from megavit.config.search_path import SearchPath, groups
from megavit.config.settings import alternatives, explain_setting, nearest, run_types, settings_below
from megavit.errors import ConfigError

# Replaced by `megavit.train.auto_model` before a configuration is composed.
AUTO_MODEL = "model=auto"

# What Hydra's own settings are here; `hydra.searchpath` is read by `search_path.py`.
_HYDRAS = {
    "hydra.run.dir": "run.dir is the run's folder",
    "hydra.sweep.dir": "sweep.dir is the folder of megavit train --multirun",
    "hydra.output_subdir": "the configuration is in the run's folder, as config.yaml",
    "hydra.job.chdir": "a run never changes the working directory",
    "hydra/launcher": "sweep.parallel=N runs several at a time, megavit submit --multirun one job each",
    "hydra/sweeper": "sweep.sampler=optuna chooses the values",
}


def parse_overrides(overrides: list[str], *, search: SearchPath | None = None) -> list[Setting]:
    """Parse `key=value` arguments.

    Args:
        overrides: as typed.
        search: the user's folders and files, whose choices exist too.

    Raises:
        ConfigError: for a key or a choice that does not exist, or a value that cannot be read.
    """
    search = search or SearchPath()
    settings = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"'{text}' is no setting: write key=value, for example train.steps=100")
        _check_key(text, search)
        settings.append(read_setting(text, run_types()))
        if settings[-1].override.is_sweep_override():
            raise ConfigError(f"'{text}' gives several values, and a run takes one; a list goes in brackets: key=[a,b]")
    return settings


def _check_key(typed: str, search: SearchPath) -> None:
    """Raise for a key or a choice of a group that does not exist."""
    key, value = key_of(typed), typed.partition("=")[2]
    if key in groups():
        _check_choice(typed, key, value, search)
        return
    if key.startswith(("hydra.", "hydra/")):
        here = next((text for name, text in _HYDRAS.items() if key.startswith(name)), "a run needs none of these")
        raise ConfigError(f"{typed} is a setting of Hydra's own application; {here}")
    if key.partition(".")[0] == "cluster":
        raise ConfigError(f"{typed} says where a job runs, which is read by megavit submit alone")
    message = explain_setting(key, groups=groups())
    if message is None:
        if typed.startswith("~"):
            raise ConfigError(
                f"{typed}: a setting cannot be deleted; write {key}=VALUE, or {key}=null where it may be null"
            )
        return
    renamed = f": write {message.rpartition(' ')[2]}={value}" if " is renamed to " in message else ""
    raise ConfigError(f"{typed}: {message}" if settings_below(key) else f"{message}{renamed}")


def _check_choice(typed: str, group: str, value: str, search: SearchPath) -> None:
    if typed == AUTO_MODEL:
        raise ConfigError(
            f"{AUTO_MODEL} is for megavit train and megavit submit, which read init_from's weights; choose one of "
            f"{', '.join(search.choices(group))}"
        )
    if value == "null" and group != "recipe":
        raise ConfigError(f"{typed}: write ~{group} to compose without a choice of {group}, or {group}=NAME")
    if value and typed.startswith("~") and read_text(value) not in search.choices(group):
        raise ConfigError(f"{typed}: {group} has no choice {value}, so that it cannot be deleted; write ~{group}")
    if typed.startswith("~") or value == "null":
        return
    is_list = value.startswith("[") and value.endswith("]")
    choices = [text.removesuffix(".yaml") for text in (list_items(value) if is_list else [read_text(value)])]
    known = search.choices(group)
    exist = {*known, *(file.name for file in search.files)}
    choice = next((text for text in choices if text not in exist), None)
    if choice is None:
        return
    near = nearest(choice, known)
    meant = [f"{group}={name}" for name in near]
    hint = f"did you mean {alternatives(meant)}?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"{group}={value} does not exist; {hint}")
