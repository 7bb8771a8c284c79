"""Names and types of all settings of a run, and the message for a name that does not exist."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import types_of
from megavit.task.config import TaskConfig
from megavit.task.registry import TASKS

# Names that other trainers use for a setting, by the last word of the path.
CALLED_ELSEWHERE = {
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
REMOVED = {
    "experimental": "a run on a GPU names the settings that have not been verified there, and continues",
    "parallel.cp": "context parallelism does not exist",
}

_NUM_SUGGESTIONS = 3


def run_types() -> dict[str, Any]:
    """Return the type of every setting of a run by its dotted path, the settings of all tasks included."""
    return _types_with(tuple(row.config for row in TASKS.values()))


@cache
def _types_with(tasks: tuple[type[TaskConfig], ...]) -> dict[str, Any]:
    found = types_of(ExperimentConfig)
    for task in tasks:
        found |= types_of(task, "task.")
    return found


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting by its dotted path."""
    found: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        path = f"{prefix}{part.name}"
        found |= flatten(value, f"{path}.") if is_dataclass(value) else {path: value}
    return found


def explain_setting(key: str, *, groups: Sequence[str]) -> str | None:
    """Return what is wrong with the name of a setting, and the right one; None for a setting that exists.

    Args:
        key: dotted path.
        groups: names of the configuration groups, which may be meant.
    """
    known = run_types()
    if key in known:
        return None
    if key in RENAMED:
        return f"{key} is renamed to {RENAMED[key]}"
    if key in REMOVED:
        return f"{key} is no longer needed: {REMOVED[key]}; remove it"
    if keys := settings_below(key):
        shown = f"{', '.join(keys[:_NUM_SUGGESTIONS])}{', …' if len(keys) > _NUM_SUGGESTIONS else ''}"
        return f"{key} is a group of {len(keys)} settings; set one of them: {shown}"
    near = _nearest_settings(key, [*known, *groups])
    hint = (
        f"did you mean {alternatives(near)}?"
        if near
        else "megavit train --help GROUP lists the settings of a group, and megavit train --cfg job all of them"
    )
    return f"the setting {key} does not exist; {hint}"


def settings_below(group: str) -> list[str]:
    """Return the settings of a group of settings, such as `train`."""
    return [path for path in run_types() if path.startswith(f"{group}.")]


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> list[str]:
    """Return up to three known words, the most similar first."""
    return difflib.get_close_matches(word, list(known), n=_NUM_SUGGESTIONS, cutoff=cutoff)


def alternatives(words: Sequence[str]) -> str:
    """Join words as in `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _nearest_settings(typed: str, known: list[str]) -> list[str]:
    """Return the settings that a name may stand for; where the last word fits, that one alone."""
    last = typed.rpartition(".")[2].lower()
    # `lr` or `trainer.lr` for `optim.lr`; of several candidates, the one with the nearest path.
    same = nearest(typed, [path for path in known if path.rpartition(".")[2] == last], cutoff=0)
    if same:
        return same[:1]
    if last in CALLED_ELSEWHERE:
        return [CALLED_ELSEWHERE[last]]
    return nearest(typed, known)
