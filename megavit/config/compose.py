"""Compose an ExperimentConfig from the command line with Hydra, and report errors in one line."""

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import Setting, key_of, read_setting, read_text, types_of
from megavit.errors import ConfigError
from megavit.optim.registry import rule_settings
from megavit.plugins import is_plugin
from megavit.task.config import ClassificationConfig, TaskConfig
from megavit.task.registry import TASKS, TaskRow, config_class, tasks_with
from megavit.validation import suggest

# Names that other trainers use for a setting, by the last word of the path.
_CALLED_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "blr": "optim.base_lr",
    "wd": "optim.weight_decay",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "grad_clip": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "ema_decay": "optim.ema",
    "optimizer": "optim.name",
    "opt": "optim.name",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "train_iters": "train.steps",
    "iterations": "train.steps",
    "amp": "train.precision",
    "dtype": "train.precision",
    "num_workers": "data.workers",
    "img_size": "data.image_size",
    "input_size": "data.image_size",
    "resolution": "data.image_size",
    "num_channels": "data.channels",
    "in_chans": "data.channels",
    "dataset": "data.path",
    "data_path": "data.path",
    "data_dir": "data.path",
    "depth": "model.num_layers",
    "embed_dim": "model.hidden_size",
    "mlp_dim": "model.ffn_size",
    "heads": "model.num_heads",
    "dropout": "model.hidden_dropout",
    "drop_path_rate": "model.drop_path",
    "smoothing": "task.label_smoothing",
    "tensor_parallel": "parallel.tp",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_parallel": "parallel.pp",
    "pipeline_model_parallel_size": "parallel.pp",
    "output_dir": "run.dir",
    "save_dir": "run.dir",
    "num_gpus": "run.ranks",
    "nproc_per_node": "run.ranks",
    "save_interval": "checkpoint.save_every",
    "log_interval": "metrics.log_every",
    "wandb_project": "metrics.wandb",
    "pretrained": "init_from",
}

# Old and new names of settings; saved configurations are read with both.
RENAMED = {
    "optim.decay": "optim.schedule",
    "optim.clip": "optim.clip_grad",
    "checkpoint.every": "checkpoint.save_every",
    "metrics.every": "metrics.log_every",
    "data.eval_crop": "data.crop_pct",
    "data.erase": "data.random_erasing",
    "data.shift": "data.random_shift",
    "data.mix_prob": "data.mixup_prob",
    "data.mix_switch": "data.mixup_switch_prob",
    "model.linears": "model.linear_backend",
    "model.attention": "model.attention_backend",
    "task.norm_pix": "task.norm_pix_loss",
}

# Settings that no longer exist, and why; saved configurations may hold them.
_REMOVED = {
    "experimental": "a run on a GPU names the settings that have not been verified there, and goes on",
    "parallel.cp": "context parallelism does not exist",
}

# One of each pair is null; to override one clears the other.
_EITHER_OR = (("train.steps", "train.epochs"), ("optim.lr", "optim.base_lr"))

# Replaced by `megavit.train.auto_model` before a configuration is composed.
AUTO_MODEL = "model=auto"


def config_dir() -> Path:
    """Return the folder of YAML files, in the repository or in the installed package."""
    return Path(str(files("megavit.conf").joinpath("train.yaml"))).parent


def choices(group: str) -> list[str]:
    """Return the choices of a group, such as `model` or `recipe`."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    """Return the Hydra groups, without `cluster`, which only megavit submit reads."""
    folders = (path for path in config_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return sorted(path.name for path in folders if path.name != "cluster")


def compose(overrides: list[str]) -> ExperimentConfig:
    """Compose the configuration of a run.

    Args:
        overrides: `key=value`, as typed (see `overrides.py`).

    Raises:
        ConfigError: for an unknown key or choice (the nearest one is named), or a value of a wrong type.
    """
    settings = _read(overrides)
    typed = {setting.key for setting in settings}
    cleared = [
        f"{loser}=null"
        for pair in _EITHER_OR
        for winner, loser in (pair, pair[::-1])
        if winner in typed and loser not in typed
    ]
    if any(setting.key == "optim.name" and is_plugin(str(setting.value)) for setting in settings):
        # What the chosen group and recipe set is for an optimizer of megavit's.
        cleared += [f"optim.{key}=null" for key in sorted(rule_settings()) if f"optim.{key}" not in typed]
    # Hydra deletes a group's choice with a tilde; users type null.
    typed_overrides = ["~recipe" if setting.hydra == "recipe=null" else setting.hydra for setting in settings]
    if "recipe" not in typed and any(_is_other_data(setting) for setting in settings):
        typed_overrides.append("~recipe")
        if "data" not in typed:
            # Otherwise the channel, mean and std of the digits would remain.
            typed_overrides.append("data=folder")
    if "optim.warmup_steps" in typed and "optim.shorten_warmup" not in typed:
        typed_overrides.append("optim.shorten_warmup=false")
    _register(tuple(TASKS.items()))
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose("train", overrides=[*typed_overrides, *cleared])
        OmegaConf.resolve(composed)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, settings)) from error
    assert isinstance(config, ExperimentConfig)
    _check_task_name(config)
    config.task = config.task.with_sizes(config.model)
    return config


@cache
def _register(tasks: tuple[tuple[str, TaskRow], ...]) -> None:
    """Store the types of all settings in Hydra, as long as the process lives; a task's YAML adds its own settings."""
    store = ConfigStore.instance()
    store.store(name="run_config", node=ExperimentConfig(task=TaskConfig()))
    for name, row in tasks:
        store.store(group="task", name=f"{name}_settings", node=row.config)


def to_yaml(config: ExperimentConfig) -> str:
    """Return the resolved configuration as YAML, as saved in the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> ExperimentConfig:
    """Read a configuration that `to_yaml` wrote.

    Raises:
        ConfigError: if it does not fit this version's settings.
    """
    if "${" in text:
        raise ConfigError(
            "a run's configuration holds ${…}, which is resolved before it is written; it was tampered with"
        )
    try:
        saved = OmegaConf.create(text)
        if isinstance(saved, DictConfig):
            for old, new in RENAMED.items():
                group, _, name = old.partition(".")
                if isinstance(saved.get(group), DictConfig) and name in saved[group]:
                    saved[group][new.partition(".")[2]] = saved[group].pop(name)
            for removed in _REMOVED:
                group, _, name = removed.rpartition(".")
                of = saved.get(group) if group else saved
                if isinstance(of, DictConfig):
                    of.pop(name, None)
        default = ExperimentConfig(task=_read_task(saved))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), saved))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"a run's configuration cannot be read: {_explain(error)}") from error
    assert isinstance(config, ExperimentConfig)
    return config


def _read_task(saved: Any) -> TaskConfig:
    """Return the default settings of the task that a saved configuration names.

    Earlier runs have the settings of all tasks, null where they are another task's; here these are removed.
    """
    task = saved.get("task") if isinstance(saved, DictConfig) else None
    if not isinstance(task, DictConfig):
        return ClassificationConfig()
    default = config_class(task.get("name", ClassificationConfig.name))()
    for setting in [setting for setting in task if task[setting] is None]:
        del task[setting]
    return default


def _check_task_name(config: ExperimentConfig) -> None:
    """Refuse `task.name=mae` for a group that was chosen by `task=classify`."""
    name = config.task.name
    if config_class(name) is not type(config.task):
        raise ConfigError(f"task.name={name}: choose the task with its settings, by task={name}")


def merge(config: ExperimentConfig, overrides: list[str]) -> ExperimentConfig:
    """Override settings of a saved configuration.

    Args:
        config: the saved configuration.
        overrides: `key=value`, as typed; the choice of a group cannot change.

    Raises:
        ConfigError: for an unknown key, or a value of a wrong type.
    """
    settings = _read(overrides)
    for setting in settings:
        if setting.key in groups():
            hint = f", data.source={setting.value} for example" if setting.key == "data" else ""
            raise ConfigError(f"{setting.typed}: a run's groups are as they were; set single keys of them{hint}")
    try:
        typed = OmegaConf.create({})
        for setting in settings:
            OmegaConf.update(typed, setting.key, setting.value)
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), typed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, settings)) from error
    assert isinstance(merged, ExperimentConfig)
    _check_task_name(merged)
    return merged


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting by its dotted path."""
    found: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        path = f"{prefix}{part.name}"
        found |= flatten(value, f"{path}.") if is_dataclass(value) else {path: value}
    return found


def run_types() -> dict[str, Any]:
    """Return the type of every setting of a run by its dotted path, the settings of all tasks included."""
    return _types_with(tuple(row.config for row in TASKS.values()))


@cache
def _types_with(tasks: tuple[type[TaskConfig], ...]) -> dict[str, Any]:
    found = types_of(ExperimentConfig)
    for task in tasks:
        found |= types_of(task, "task.")
    return found


def _read(overrides: list[str]) -> list[Setting]:
    settings = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"'{text}' is no setting: write key=value, for example train.steps=100")
        _check_key(text)
        settings.append(read_setting(text, run_types()))
        if settings[-1].override.is_sweep_override():
            raise ConfigError(f"'{text}' gives several values, and a run takes one; a list goes in brackets: key=[a,b]")
    return settings


def _is_other_data(setting: Setting) -> bool:
    """Return whether a setting chooses other data than the default recipe, the digits."""
    return setting.key in ("data", "data.path") and setting.value not in ("digits", None)


def _check_key(typed: str) -> None:
    """Raise for an unknown key or an unknown choice of a group."""
    key, value = key_of(typed), typed.partition("=")[2]
    if key in groups():
        if typed == AUTO_MODEL:
            raise ConfigError(
                f"{AUTO_MODEL} is for megavit train and megavit submit, which read init_from's weights; choose one of "
                f"{', '.join(choices(key))}"
            )
        if typed not in ("recipe=null", "~recipe") and read_text(value) not in choices(key):
            raise ConfigError(_unknown(f"{key}={value}", value, choices(key), form=f"{key}={{}}"))
        return
    known = list(run_types())
    if key in known:
        return
    if key in RENAMED:
        raise ConfigError(f"{key} is renamed to {RENAMED[key]}: write {RENAMED[key]}={value}")
    if key in _REMOVED:
        raise ConfigError(f"{key} is no longer needed: {_REMOVED[key]}; leave it away")
    if key.partition(".")[0] == "cluster":
        raise ConfigError(f"{typed} says where a job runs, which is read by megavit submit alone")
    if keys := [path for path in known if path.startswith(f"{key}.")]:
        raise ConfigError(f"{typed} sets a whole section; set its keys: {', '.join(keys)}")
    raise ConfigError(_unknown(f"the setting {key}", key, [*known, *groups()], form="{}"))


def _unknown(what: str, typed: str, known: list[str], *, form: str) -> str:
    last = typed.rpartition(".")[2].lower()
    # `lr` or `trainer.lr` for `optim.lr`; of several candidates, the one with the nearest path.
    same = [path for path in known if path.rpartition(".")[2] == last]
    elsewhere = next((path for path in known if path == _CALLED_ELSEWHERE.get(last)), None)
    near = suggest(typed, same, cutoff=0) or elsewhere or suggest(typed, known, cutoff=0.5)
    hint = f"did you mean {form.format(near)}?" if near else f"known: {', '.join(known)}"
    return f"{what} does not exist; {hint}"


def _explain(error: Exception, settings: Iterable[Setting] = ()) -> str:
    """Extract setting, value and expected type from a message of Hydra or OmegaConf."""
    # OmegaConf's message, at the bottom of the chain, names value and type; Hydra's only names the file.
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = str(cause)
    other_task = _explain_other_task(text, settings)
    if other_task is not None:
        return other_task
    found = re.search(r"full_key: (\S+)", text) or re.search(r"full_key: (\S+)", str(error))
    key, first = found.group(1) if found else getattr(cause, "full_key", None), text.splitlines()[0]
    typed = next((setting.typed for setting in settings if setting.key == key), "")
    # OmegaConf prints 1e3 as 1000.0.
    as_typed = f" ({typed})" if typed and typed.partition("=")[2] not in first else ""
    return f"{key}: {first}{as_typed}" if key else first


def _explain_other_task(text: str, settings: Iterable[Setting]) -> str | None:
    """Describe a setting that the chosen task does not have and another one has; None for another error.

    Args:
        text: OmegaConf's message.
        settings: as typed.
    """
    found = re.search(r"full_key: task\.(\w+)\s+(?:reference_type=\w+\s+)?object_type=(\w+)", text)
    if not found or "not in" not in text:
        return None
    owners, chosen = tasks_with(found[1]), [name for name, row in TASKS.items() if row.config.__name__ == found[2]]
    if not owners or not chosen:
        return None
    key = f"task.{found[1]}"
    typed = next((setting.typed for setting in settings if setting.key == key), key)
    return (
        f"{typed} would be ignored by task.name={chosen[0]}: it is a setting of task={' and task='.join(owners)}; "
        f"leave it away"
    )
