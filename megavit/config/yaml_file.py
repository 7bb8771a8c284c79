"""Read a YAML file of the user's: every error names the file and the line, and nothing of it is run as code."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf

from megavit.config.overrides import read_text
from megavit.config.search_path import groups
from megavit.config.settings import explain_setting, run_types, settings_below
from megavit.errors import ConfigError, printable

_MAX_BYTES = 1 << 20
_STANDARD = "tag:yaml.org,2002:"
_PLAIN_TAGS = tuple(f"{_STANDARD}{name}" for name in ("int", "float", "bool", "timestamp"))


class UserYaml:
    """A YAML file as nodes, with the line of every key.

    Args:
        path: the file.

    Raises:
        ConfigError: with file and line, for what is no YAML, a tab, a duplicate key, an anchor or a tag.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = _read(path)
        self._root = self._compose()

    def config(self, *, package: str | None) -> Any:
        """Return the file's keys and values, checked against the settings.

        Args:
            package: dotted path that the keys are below, "" for an experiment; None where it is unknown, and the keys
                are not checked.

        Raises:
            ConfigError: with file and line, for a key that does not exist.
        """
        if self._root is None:
            return OmegaConf.create({})
        if package is not None:
            for key, value in self._root.value:
                if key.value != "defaults" and (package or key.value != "hydra"):
                    self._check(f"{package}.{key.value}" if package else key.value, key, value)
        for key, value in self._root.value:
            if key.value == "defaults":
                self._check_defaults(value)
        loader = yaml.SafeLoader("")
        try:
            values = loader.construct_document(self._root)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise self._error(getattr(error, "problem_mark", None) or self._root.start_mark, str(error)) from error
        return OmegaConf.create(values)

    def line_of(self, key: str, *, package: str) -> int | None:
        """Return the line of a setting, or of the nearest key above it; None if the file does not set it.

        Args:
            key: dotted path of the setting.
            package: dotted path that the file's keys are below.
        """
        inside = key if not package else key.removeprefix(f"{package}.") if key.startswith(f"{package}.") else ""
        node, line = self._root, None
        for word in inside.split(".") if inside else ():
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = next((pair for pair in pairs if pair[0].value == word), None)
            if found is None:
                return line if node is not self._root and not isinstance(node, yaml.MappingNode) else None
            line, node = found[0].start_mark.line + 1, found[1]
        return line

    def error(self, message: str, *, line: int | None) -> ConfigError:
        """Return an error that names this file and a line of it."""
        where = f"{printable(str(self.path))}:{line}" if line is not None else printable(str(self.path))
        return ConfigError(f"{where}: {message}")

    def line_with(self, word: str) -> int | None:
        """Return the first line that contains a word, of the defaults list for example."""
        lines = self.text.splitlines()
        return next((number for number, line in enumerate(lines, 1) if word in line.partition("#")[0]), None)

    def line_of_header(self) -> int | None:
        """Return the line of a header, such as `# @package _global_`."""
        lines = self.text.splitlines()
        return next((number for number, line in enumerate(lines, 1) if line.lstrip("# ").startswith("@")), None)

    def _compose(self) -> yaml.MappingNode | None:
        try:
            for event in yaml.parse(self.text, Loader=yaml.SafeLoader):
                self._check_event(event)
            root = yaml.compose(self.text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "is no YAML"
            if mark is not None and "'\\t'" in problem:
                problem = "a tab indents this line; YAML takes spaces"
            raise self._error(mark, problem) from error
        except (yaml.YAMLError, RecursionError) as error:
            raise self.error(str(error).splitlines()[0] or "is nested too deep", line=None) from error
        if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == f"{_STANDARD}null"):
            return None
        if not isinstance(root, yaml.MappingNode):
            raise self._error(root.start_mark, "a configuration has keys and values, such as train: {steps: 100}")
        self._check_keys(root)
        return root

    def _check_event(self, event: yaml.Event) -> None:
        if getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise self._error(
                event.start_mark, f"{sign}{event.anchor}: anchors are not read; repeat the value or write ${{key}}"
            )
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            raise self._error(event.start_mark, f"{tag}: tags are not read; a configuration runs no code")

    def _check_keys(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._check_keys(item)
        if not isinstance(node, yaml.MappingNode):
            return
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_STANDARD}merge":
                raise self._error(key.start_mark, "a key must be a word")
            if key.value in lines:
                raise self._error(key.start_mark, f"{key.value} was set in line {lines[key.value]} already")
            lines[key.value] = key.start_mark.line + 1
            key.tag = f"{_STANDARD}str"
            self._check_keys(value)

    def _check(self, path: str, key: yaml.Node, value: yaml.Node) -> None:
        """Check the name of a setting and of those below it; a text setting takes its value as written."""
        kind = run_types().get(path)
        if kind is not None:
            if _is_text(kind):
                _take_as_text(value)
            return
        if settings_below(path):
            if not isinstance(value, yaml.MappingNode):
                if value.tag == f"{_STANDARD}null":
                    return
                raise self._error(key.start_mark, f"{path} is a group of settings; set its keys below it")
            for inner, inner_value in value.value:
                self._check(f"{path}.{inner.value}", inner, inner_value)
            return
        message = explain_setting(path, groups=groups())
        raise self._error(key.start_mark, message or path)

    def _check_defaults(self, node: yaml.Node) -> None:
        """Check the form of a defaults list, which Hydra takes for granted."""
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node.start_mark, "defaults is a list, such as [override /model: vit_b16, _self_]")
        for entry in node.value:
            parts = entry.value if isinstance(entry, yaml.MappingNode) else [(entry, None)]
            choice = parts[0][1] if parts else None
            choices = choice.value if isinstance(choice, yaml.SequenceNode) else [choice] if choice else []
            words = [parts[0][0], *choices] if len(parts) == 1 else []
            if not words or not all(_is_word(word) for word in words):
                raise self._error(
                    entry.start_mark, "an entry of defaults is FILE, GROUP: CHOICE or override /GROUP: CHOICE"
                )

    def _error(self, mark: yaml.Mark | None, message: str) -> ConfigError:
        return self.error(message, line=None if mark is None else mark.line + 1)


def _read(path: Path) -> str:
    name = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{name} is larger than {_MAX_BYTES >> 20} MiB; it is no configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: is no UTF-8; save it as UTF-8") from error


def _is_text(kind: Any) -> bool:
    parts = [part for part in get_args(kind) if part is not NoneType] if NoneType in get_args(kind) else [kind]
    return len(parts) == 1 and (parts[0] in (str, list[str]) or get_origin(parts[0]) is dict)


def _is_word(node: yaml.Node) -> bool:
    """Return whether a node is a non-empty text or null."""
    return isinstance(node, yaml.ScalarNode) and bool(node.value) and node.tag[len(_STANDARD) :] in ("str", "null")


def _take_as_text(node: yaml.Node) -> None:
    for scalar in _scalars(node):
        if scalar.style is None:
            if scalar.tag in _PLAIN_TAGS:
                scalar.tag = f"{_STANDARD}str"
            if scalar.tag == f"{_STANDARD}str":
                scalar.value = read_text(scalar.value)


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
