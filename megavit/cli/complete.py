"""Propose what may be typed next on a command line, for completion in a shell.

Each press of the key starts a process: nothing here imports torch or Hydra.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavit.cli.argument_words import CommandWords, Word, read_words
from megavit.cli.cluster_settings import CLUSTER, cluster_types
from megavit.config.reference import values_of
from megavit.config.search_path import SUFFIXES, SearchPath, groups, split_search_path
from megavit.config.settings import run_types
from megavit.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
# Settings and arguments whose values are paths.
_PATHS = ("data.path", "run.dir", "init_from", "from", "to", "out")
# Prefixes of a path, as in ema:runs/digits.
_SCHEMES = ("ema:", "timm:", "hf:", "mae:", "nemo:")


def candidates(words: list[str], commands: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return what the last word may become.

    Args:
        words: the command line from `megavit` on; the last word is the one that is being typed, and may be empty.
        commands: module and function of each command.
    """
    *before, typed = words
    if len(before) < 2:
        return _beginning_with(typed, [*commands, "--help", "--version", "--shell-completion"])
    if before[1] == "--shell-completion":
        actions = ("", "install=", "uninstall=")
        return _beginning_with(typed, [f"{action}{shell}" for action in actions for shell in SHELLS])
    if before[1] not in commands:
        return []
    return _Command(read_words(*commands[before[1]]), before[2:], takes_cluster=before[1] == "submit").candidates(typed)


@dataclass(frozen=True)
class _Command:
    """What a command takes.

    Attributes:
        own: its own arguments and the settings that it takes.
        before: the words that are typed already.
        takes_cluster: whether it takes `cluster=` and `cluster.KEY=`.
    """

    own: CommandWords
    before: list[str]
    takes_cluster: bool

    def candidates(self, typed: str) -> list[str]:
        found = list(self._after_flag(typed))
        if found:
            return found
        if typed.startswith("-"):
            return self._of_flag(typed)
        key, sign, value = typed.partition("=")
        return self._of_value(key, value) if sign else self._of_key(typed)

    def _after_flag(self, typed: str) -> Iterator[str]:
        """Propose the value of the flag that the word before is."""
        last = self.before[-1] if self.before else ""
        if last in ("--help", "-h"):
            yield from self._of_topic(typed)
        flag = self.own.find(last)
        if flag is not None and flag.takes_value and not typed.startswith("-"):
            yield from _of_word(flag, typed)

    def _of_flag(self, typed: str) -> list[str]:
        key, sign, value = typed.partition("=")
        if not sign:
            return _beginning_with(typed, [*(word.key for word in self.own.words if word.is_flag), "--help"])
        flag = self.own.find(key)
        return [f"{key}={each}" for each in _of_word(flag, value)] if flag is not None and flag.takes_value else []

    def _of_topic(self, typed: str) -> list[str]:
        if self.own.settings is not True:
            return _beginning_with(typed, [word.key for word in self.own.words])
        if "." in typed:
            return _beginning_with(typed, run_types())
        return _beginning_with(typed, [*_sections(run_types()), *(key for key in run_types() if "." not in key)])

    def _of_key(self, typed: str) -> list[str]:
        if typed.startswith("~"):
            # Only the choice of a group can be deleted.
            return _beginning_with(typed, [f"~{name}" for name in self._groups()])
        sign = typed[: len(typed) - len(typed.lstrip("+"))]
        key = typed.removeprefix(sign)
        own = [f"{word.key}=" for word in self.own.words if not word.is_flag]
        types = self._types()
        if "." in key:
            names = [f"{name}=" for name in types] + own
        else:
            single = [f"{name}=" for name in types if "." not in name]
            names = [*own, *(f"{name}=" for name in self._groups()), *single, *(f"{s}." for s in _sections(types))]
        return [f"{sign}{name}" for name in _beginning_with(key, dict.fromkeys(names))]

    def _of_value(self, key: str, value: str) -> list[str]:
        name = key.lstrip("+~")
        own = self.own.find(name)
        start = value[: max(value.rfind("["), value.rfind(",")) + 1]
        item = value.removeprefix(start)
        if own is not None:
            found = _of_word(own, item)
        elif name in self._groups():
            found = _beginning_with(item, self._search().choices(name))
            # The folders around would hide the choices.
            found += _files(item, keep=_is_yaml_file if found else _is_yaml_or_folder)
        elif name in _PATHS:
            found = _files(item)
        else:
            found = _beginning_with(item, values_of(self._types().get(name)))
        return [f"{key}={start}{each}" for each in found]

    def _types(self) -> dict[str, Any]:
        if self.own.settings is not True:
            return {key: run_types()[key] for key in self.own.settings or () if key in run_types()}
        return run_types() | (cluster_types() if self.takes_cluster else {})

    def _groups(self) -> list[str]:
        if not self.own.composes:
            return []
        return [*groups(), CLUSTER] if self.takes_cluster else groups()

    def _search(self) -> SearchPath:
        """Return the folders that the words before name; without them if they are wrong."""
        words = iter(self.before)
        named = []
        for word in words:
            key, sign, value = word.partition("=")
            if key in ("--config-dir", "-cd"):
                named.append(f"--config-dir={value if sign else next(words, '')}")
            elif key == "hydra.searchpath":
                named.append(word)
        try:
            return split_search_path(named)[0]
        except ConfigError:
            return SearchPath()


def _sections(types: dict[str, Any]) -> list[str]:
    """Return the first words of settings with a dot."""
    return list(dict.fromkeys(key.partition(".")[0] for key in types if "." in key))


def _of_word(word: Word, typed: str) -> list[str]:
    """Propose the values of a command's own argument."""
    if word.is_path:
        return _files(typed, keep=Path.is_dir if word.key == "--config-dir" else None)
    return _beginning_with(typed, word.values)


def _beginning_with(typed: str, names: Any) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def _is_yaml_file(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.is_dir()


def _is_yaml_or_folder(path: Path) -> bool:
    return path.suffix in SUFFIXES or path.is_dir()


def _files(typed: str, *, keep: Callable[[Path], bool] | None = None) -> list[str]:
    """Propose files and folders; the text typed so far is kept, a ~ included."""
    scheme = next((scheme for scheme in _SCHEMES if typed.startswith(scheme)), "")
    folder, slash, name = typed.removeprefix(scheme).rpartition("/")
    shown = f"{scheme}{folder}{slash}"
    try:
        found = sorted(Path(os.path.expanduser(f"{folder}{slash}") or ".").iterdir())
    except OSError:
        return []
    return [
        f"{shown}{path.name}{'/' if path.is_dir() else ''}"
        for path in found
        if path.name.startswith(name)
        and path.name.startswith(".") <= name.startswith(".")
        and (keep is None or keep(path))
    ]
