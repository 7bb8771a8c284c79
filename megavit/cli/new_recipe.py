"""`megavit config new FILE.yaml [recipe=NAME]`: write a recipe with every setting explained, to edit and train with."""

import os
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from megavit.config.compose import Composition, compose, compose_with_sources
from megavit.config.overrides import write_setting
from megavit.config.reference import explanations as explanations_of
from megavit.config.search_path import SUFFIXES, groups
from megavit.config.settings import flatten
from megavit.errors import ConfigError
from megavit.runtime.run_dir import FINISHED

_USAGE = "megavit config new FILE.yaml [recipe=NAME] [key=value …]"
_WIDTH = 116


def config(settings: list[str]) -> int:
    """Write a new recipe file.

    Args:
        settings: `new`, the file, and the settings that it starts from.

    Raises:
        ConfigError: if the words are others, the file exists, or a setting is wrong.
    """
    if len(settings) < 2 or settings[0] != "new" or "=" in settings[1] or settings[1].startswith("-"):
        raise ConfigError(f"write {_USAGE}")
    path, overrides = Path(settings[1]), settings[2:]
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name of a recipe file ends in .yaml")
    text = new_recipe(compose_with_sources(overrides), command=f"megavit train recipe={path}", source=overrides)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists; choose another name or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    print(f"{path}: edit it, then run megavit train recipe={path}")
    return FINISHED


def new_recipe(composition: Composition, *, command: str, source: list[str]) -> str:
    """Return a recipe that composes to the same configuration, with a comment on every setting.

    Args:
        composition: what the recipe starts from.
        command: the command that trains it.
        source: the overrides of the composition, for a comment.
    """
    chosen = {group: composition.node.hydra.runtime.choices.get(group) for group in groups() if group != "recipe"}
    override_lines = [f"  - override /{group}: {_dump(name)}" for group, name in chosen.items() if name]
    groups_alone = ["recipe=null", *(f"{group}={name}" for group, name in chosen.items() if isinstance(name, str))]
    is_set = _settings_to_write(groups_alone, flatten(composition.config))
    lines = [
        "# @package _global_",
        f"# {command}",
        "#",
        f"# Written by megavit config new from {' '.join(source) or 'the default configuration'}.",
        "# `# KEY: VALUE` shows a setting that has this value already; remove its # to set it.",
        "defaults:",
        *override_lines,
        "  - _self_",
    ]
    for part in fields(composition.config):
        value = getattr(composition.config, part.name)
        if is_dataclass(value):
            lines += ["", f"{part.name}:", *_group(value, part.name, composition.node, is_set)]
            if not any(key.startswith(f"{part.name}.") for key in is_set):
                # A key without a value would set the group to null.
                lines[lines.index(f"{part.name}:")] = f"# {part.name}:"
        else:
            explanation = explanations_of(type(composition.config)).get(part.name, "")
            lines += ["", *_setting(part.name, value, explanation, indent="", is_set=part.name in is_set)]
    return "\n".join(lines) + "\n"


def _settings_to_write(overrides: list[str], wanted: dict[str, Any]) -> set[str]:
    """Return the settings that lead from a composition of groups to the wanted values."""
    found: set[str] = set()
    # A setting may change the default of another one: task.decoder_hidden_size that of task.decoder_num_heads.
    while True:
        composed = flatten(compose([*overrides, *(write_setting(key, wanted[key]) for key in sorted(found))]))
        different = {key for key, value in wanted.items() if composed.get(key) != value}
        if different <= found:
            return found
        found |= different


def _group(group: Any, name: str, node: DictConfig, is_set: set[str]) -> Iterator[str]:
    explanations: dict[str, str] = {}
    for kind in reversed(type(group).__mro__):
        explanations |= explanations_of(kind) if is_dataclass(kind) else {}
    for part in fields(group):
        value = getattr(group, part.name)
        if is_dataclass(value) or (name, part.name) == ("task", "name"):
            continue
        key = f"{name}.{part.name}"
        interpolation = _interpolation(node, key)
        yield from _setting(
            part.name,
            interpolation or value,
            explanations.get(part.name, ""),
            indent="  ",
            is_set=key in is_set and interpolation is None,
        )


def _interpolation(node: DictConfig, key: str) -> str | None:
    """Return the ${…} that a setting was composed of, or None."""
    group, _, name = key.partition(".")
    raw: Any = OmegaConf.to_container(node[group], resolve=False)
    value = raw.get(name)
    return value if isinstance(value, str) and "${" in value else None


def _setting(name: str, value: Any, explanation: str, *, indent: str, is_set: bool) -> list[str]:
    """Return the lines of a setting: the explanation as comments, then the value."""
    sentence, dot, _ = explanation.partition(". ")
    about = textwrap.wrap(sentence + dot.strip(), _WIDTH - len(indent))
    sign = "" if is_set else "# "
    return [*(f"{indent}## {line}" for line in about), f"{indent}{sign}{name}: {_dump(value)}"]


def _dump(value: Any) -> str:
    plain = OmegaConf.to_container(OmegaConf.create({"value": value}), enum_to_str=True)["value"]  # type: ignore[index, call-overload]
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip().replace(os.linesep, " ")
