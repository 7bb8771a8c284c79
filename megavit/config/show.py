"""Show a composed configuration and where it comes from, as Hydra's --cfg and --info do."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import Container, DictConfig, OmegaConf, flag_override, open_dict

from megavit.config.compose import Composition, hydra_initialized
from megavit.config.settings import alternatives, nearest
from megavit.config.show_flags import Part, Topic
from megavit.errors import ConfigError

_HYDRA = "hydra"


def config_text(composition: Composition, *, part: Part, resolve: bool, package: str | None) -> str:
    """Return a configuration as YAML.

    Args:
        composition: the composed configuration.
        part: the run's settings, Hydra's, or both.
        resolve: whether interpolations are replaced by their values; without it they are as written in the files.
        package: dotted path of the node to show; None for all of them.

    Raises:
        ConfigError: if there is no such node.
    """
    node = _part(composition, part, resolve=resolve)
    if package in (None, "_global_"):
        return str(OmegaConf.to_yaml(node))
    assert package is not None
    selected: Any = OmegaConf.select(node, package, default=_Absent)
    if selected is _Absent:
        near = nearest(package, _paths(OmegaConf.to_container(node)))
        hint = f"did you mean {alternatives(near)}?" if near else f"it has {', '.join(map(str, node))}"
        raise ConfigError(f"--package {package}: the configuration has no {package}; {hint}")
    if not isinstance(selected, Container):
        return f"{selected.name if isinstance(selected, Enum) else selected}\n"
    return f"# @package {package}\n{OmegaConf.to_yaml(selected)}"


class _Absent:
    """What `OmegaConf.select` returns for a node that does not exist."""


def _part(composition: Composition, part: Part, *, resolve: bool) -> DictConfig:
    node = copy.deepcopy(composition.node)
    if resolve:
        OmegaConf.resolve(node)
        # A task derives some of its settings from the model's.
        node.merge_with(OmegaConf.structured(composition.config))
    if part is Part.job:
        with open_dict(node):
            del node[_HYDRA]
    if part is not Part.hydra:
        return node
    hydra = OmegaConf.masked_copy(node, [_HYDRA])
    with flag_override(hydra[_HYDRA], ["struct", "readonly"], [False, False]):
        # Templates of Hydra's help, which Hydra does not print here either.
        del hydra[_HYDRA]["help"], hydra[_HYDRA]["hydra_help"]
    return hydra


def _paths(node: Any, prefix: str = "") -> list[str]:
    """Return the paths of all nodes of a nested dictionary."""
    if not isinstance(node, dict):
        return []
    return [path for name, child in node.items() for path in (f"{prefix}{name}", *_paths(child, f"{prefix}{name}."))]


def print_info(composition: Composition, topic: Topic) -> None:
    """Print where a configuration comes from, by Hydra's own printing.

    Args:
        composition: the composed configuration.
        topic: what to print.
    """
    with hydra_initialized(composition.search):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        overrides = list(composition.node.hydra.overrides.task)
        with _root_logger_restored():
            hydra.show_info(topic.value, config_name=composition.search.config_name, overrides=overrides)


@contextmanager
def _root_logger_restored() -> Iterator[None]:
    """Undo what Hydra does to the root logger, by which it prints."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
