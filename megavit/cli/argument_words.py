"""Read what a command takes from its source, without importing it.

A command's module imports torch, which takes seconds; completion in a shell has a fraction of one.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megavit.config.reference import values_of

_PATH_FORMS = ("RUN", "DIR", "FILE", "FOLDER", "IMAGE", "PATH", "PICTURE", "KIND:PATH")


@dataclass(frozen=True)
class Word:
    """An argument of a command.

    Attributes:
        key: the word as typed, such as `from` or `--cfg`.
        short: second spelling of a flag.
        takes_value: whether a value follows.
        is_path: whether the value is a path.
        values: values that it may have; none if any.
    """

    key: str
    short: str
    takes_value: bool
    is_path: bool
    values: tuple[str, ...]

    @property
    def is_flag(self) -> bool:
        return self.key.startswith("-")


@dataclass(frozen=True)
class CommandWords:
    """What a command takes.

    Attributes:
        words: its own arguments.
        settings: whether it takes settings of a run, or the names of those that it takes.
        composes: whether it composes the configuration of a run, with its groups.
    """

    words: tuple[Word, ...]
    settings: bool | tuple[str, ...]
    composes: bool

    def find(self, key: str) -> Word | None:
        """Return the argument of this key."""
        return next((word for word in self.words if key and key in (word.key, word.short)), None)


def read_words(module: str, function_name: str) -> CommandWords:
    """Return what a command takes.

    Args:
        module: full name of its module.
        function_name: its function in the module.
    """
    source = _Source.of(module)
    function = source.nodes[function_name]
    assert isinstance(function, ast.FunctionDef)
    annotations = {arg.arg: arg.annotation for arg in function.args.args + function.args.kwonlyargs}
    kind = annotations.get("args")
    classes = list(_classes(source, kind.id)) if isinstance(kind, ast.Name) else []
    words = {word.key: word for where, node in classes for word in _words(where, node)}
    named = [found for where, node in classes for found in _settings(where, node)]
    composes = any(node.name == "ConfigFlags" for _, node in classes)
    return CommandWords(tuple(words.values()), named[0] if named else "settings" in annotations, composes)


@dataclass(frozen=True)
class _Source:
    """A module as text.

    Attributes:
        nodes: its classes and functions.
        imported: the module that each imported name comes from.
    """

    nodes: dict[str, ast.stmt]
    imported: dict[str, str]

    @classmethod
    def of(cls, module: str) -> "_Source":
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        body = ast.parse(Path(spec.origin).read_text()).body
        nodes = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module]
        return cls(dict(nodes), {each.name: str(node.module) for node in imports for each in node.names})


def _classes(source: _Source, name: str) -> Iterator[tuple[_Source, ast.ClassDef]]:
    """Return a class and those that it extends, the first of all first."""
    while name not in source.nodes:
        if name not in source.imported:
            return
        source = _Source.of(source.imported[name])
    node = source.nodes[name]
    assert isinstance(node, ast.ClassDef)
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _classes(source, base.id)
    yield source, node


def _words(source: _Source, node: ast.ClassDef) -> Iterator[Word]:
    for part in node.body:
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name) or part.target.id.isupper():
            continue
        options: dict[str, Any] = {}
        if isinstance(part.value, ast.Call):
            constants = [(option.arg, option.value) for option in part.value.keywords]
            options = {str(key): value.value for key, value in constants if isinstance(value, ast.Constant)}
        kinds = [each.strip() for each in ast.unparse(part.annotation).split("|")]
        key, form = options.get("key") or part.target.id.rstrip("_"), str(options.get("form", ""))
        is_path = "Path" in kinds or form.split("|")[0].split(".")[0].strip("…") in _PATH_FORMS
        values = tuple(value for kind in kinds for value in _values(source, kind))
        if not values and not is_path and "|" in form:
            values = tuple(form.split("|"))
        yield Word(key, options.get("short", ""), not key.startswith("-") or kinds != ["bool"], is_path, values)


def _values(source: _Source, kind: str) -> list[str]:
    """Return the values of a type by its name in the source: those of an enum or a truth value."""
    if kind in ("bool", "None"):
        return values_of(bool) if kind == "bool" else []
    module = source.imported.get(kind, "")
    return values_of(getattr(import_module(module), kind)) if module.startswith("megavit.") else []


def _settings(source: _Source, node: ast.ClassDef) -> Iterator[tuple[str, ...]]:
    """Return the settings that a command names in `SETTINGS`."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id == "SETTINGS":
            if isinstance(part.value, ast.Name):
                yield tuple(getattr(import_module(source.imported[part.value.id]), part.value.id))
            elif part.value is not None:
                yield tuple(ast.literal_eval(part.value))
