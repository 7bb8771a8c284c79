"""Write the pages that follow from the code: settings, commands and recipes.

    python docs/generate.py            write docs/settings.md, docs/commands.md and docs/recipes.md
    python docs/generate.py --check    write nothing; exit code 3 if a page is stale

Types, defaults and values come from the dataclasses, texts from the `Attributes` sections of their docstrings.
"""

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from megavit.cli.arguments import Argument, NoArguments, arguments_of, usage
from megavit.cli.main import COMMANDS, LoadedCommand
from megavit.cluster.config import ClusterConfig
from megavit.cluster.registry import BACKENDS
from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.reference import enum_text, explanations, first_sentence, header_lines, type_in_words
from megavit.config.search_path import choices, config_dir
from megavit.config.settings import flatten
from megavit.task.config import TaskConfig
from megavit.task.registry import TASKS, config_class
from megavit.validation import format_value

DOCS = Path(__file__).parent
FINDINGS = 3
_NOTE = "<!-- Written by docs/generate.py; change the code, then run it again. -->\n\n"


@dataclass(frozen=True)
class Setting:
    """A row of a table.

    Attributes:
        key: the setting as typed.
        kind: its Python type.
        default: its default, as typed; a tuple of (choice, value) for each group choice that has another one.
        text: its explanation.
    """

    key: str
    kind: Any
    default: str
    text: str


def pages() -> dict[str, str]:
    """Return the text of each generated page by its file name."""
    return {"settings.md": settings_page(), "commands.md": commands_page(), "recipes.md": recipes_page()}


def settings_page() -> str:
    """Return the reference of all settings."""
    lines = [
        "# Settings",
        "",
        "Every setting of `megavit train`, by group, and those of `megavit submit`. A default is the value that "
        "`megavit train data=folder` uses; where another choice of a group has another default, it follows in "
        "brackets. [Configuration](configuration.md) explains how values are typed, [Recipes](recipes.md) lists "
        "complete experiments.",
        "",
        "## General",
        "",
    ]
    hints = get_type_hints(ExperimentConfig)
    groups = {part.name: hints[part.name] for part in fields(ExperimentConfig) if is_group(hints[part.name])}
    general = [part.name for part in fields(ExperimentConfig) if part.name not in groups]
    lines += _table(_settings(ExperimentConfig, "", _defaults(""), only=general))
    for name, kind in groups.items():
        lines += ["", f"## {name}", "", *_choices_of(name)]
        lines += _table(_settings(kind, name, _defaults(name)))
        if name == "task":
            lines += _task_sections()
    return _NOTE + "\n".join([*lines, "", *_cluster_sections()]) + "\n"


def is_group(kind: Any) -> bool:
    """Return whether a field of the configuration is a group of settings."""
    return hasattr(kind, "__dataclass_fields__")


def _task_sections() -> Iterator[str]:
    shared = {part.name for part in fields(TaskConfig)}
    for name in TASKS:
        kind = config_class(name)
        own = [part.name for part in fields(kind) if part.name not in shared]
        yield from ["", f"### task={name}", "", _first_sentence(kind), ""]
        shared |= set(own)
        if own:
            yield from _table(_settings(kind, "task", {}, only=own))


def _cluster_sections() -> Iterator[str]:
    yield from ["## cluster", "", "Where `megavit submit` sends a job. `megavit train` does not take these.", ""]
    yield from _choices_of("cluster")
    yield from _table(_settings(ClusterConfig, "cluster", {}))
    shared = {part.name for part in fields(ClusterConfig)}
    for kind, backend in BACKENDS.items():
        own = [part.name for part in fields(backend.config_class) if part.name not in shared]
        if own:
            yield from ["", f"### cluster={kind.value}", "", _first_sentence(backend.config_class), ""]
            yield from _table(_settings(backend.config_class, "cluster", {}, only=own))


def _choices_of(group: str) -> list[str]:
    """Return a table of the group's YAML files, each with its first comment; nothing for a group with one."""
    folder = config_dir() / group
    names = choices(group) if folder.is_dir() else []
    if len(names) < 2:
        return []
    rows = [(f"`{group}={name}`", _escape(first_sentence(folder / f"{name}.yaml"))) for name in names]
    return [*_markdown(["choice", "content"], rows), ""]


def _defaults(group: str) -> dict[str, Any]:
    """Return the value of each setting if the user types data=folder and its path, and nothing else."""
    base = ["data=folder", "data.path=FOLDER"]
    found = flatten(compose(base)) | {"data.path": None, "run.dir": "runs/NAME"}
    if group == "optim":
        others = {name: flatten(compose([*base, f"optim={name}"])) for name in choices("optim") if name != "adamw"}
        for key in [key for key in found if key.startswith("optim.") and key != "optim.name"]:
            differing = {name: values[key] for name, values in others.items() if values[key] != found[key]}
            found[key] = _Several(found[key], differing)
    return found


@dataclass(frozen=True)
class _Several:
    """A default with those of other choices of its group."""

    value: Any
    others: dict[str, Any]


def _settings(kind: type, group: str, defaults: dict[str, Any], *, only: Iterable[str] | None = None) -> list[Setting]:
    hints, texts = get_type_hints(kind), explanations(kind)
    found = []
    for part in fields(kind):
        if only is not None and part.name not in only:
            continue
        key = f"{group}.{part.name}" if group else part.name
        default = defaults[key] if key in defaults else _declared_default(part)
        found.append(Setting(key, hints[part.name], _show_default(default), texts.get(part.name, "")))
    return found


def _declared_default(part: Any) -> Any:
    return part.default if part.default is not MISSING else part.default_factory()


def _first_sentence(kind: type) -> str:
    return _escape(" ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split()))


def _show_default(value: Any) -> str:
    if isinstance(value, _Several):
        others = ", ".join(f"{name}: {_show_default(other)}" for name, other in value.others.items())
        return _show_default(value.value) + (f" ({others})" if others else "")
    if isinstance(value, str) and value == "":
        return ""
    return f"`{format_value(value)}`"


def _kind(kind: Any) -> str:
    return type_in_words(kind, quote="`")


def _table(settings: list[Setting]) -> list[str]:
    rows = [
        (f"`{s.key}`", _kind(s.kind), s.default, _escape(" ".join(filter(None, (s.text, enum_text(s.kind))))))
        for s in settings
    ]
    return _markdown(["setting", "type", "default", "meaning"], rows)


def _escape(text: str) -> str:
    """Return text whose signs Markdown leaves as they are; code in backticks is kept."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = parts[index].replace("*", "\\*").replace("<", "&lt;").replace("[", "\\[")
    return "`".join(parts).replace("|", "\\|")


def _markdown(heads: list[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def commands_page() -> str:
    """Return the reference of all commands and their arguments."""
    lines = [
        "# Commands",
        "",
        "`megavit COMMAND --help` prints the same. RUN is a run's folder or one of its checkpoints; `ema:RUN` is the "
        "moving average of its weights. Settings are those of [Settings](settings.md). "
        "[Configuration](configuration.md#exit-codes) lists the exit codes.",
        "",
        *_markdown(["command", "what it does"], [(f"[`{name}`](#{name})", row.help) for name, row in COMMANDS.items()]),
    ]
    for name, row in COMMANDS.items():
        entry = LoadedCommand.of(row)
        settings = getattr(entry.kind, "SETTINGS", entry.takes_settings)
        lines += ["", f"## {name}", "", f"{row.help[:1].upper() + row.help[1:]}.", "", "```text"]
        line = usage(f"megavit {name}", entry.kind or NoArguments, settings=settings)
        lines += [*_wrapped(line), "```", ""]
        rows = [
            (
                f"`{own.key}`" + (f", `{own.short}`" if own.short else ""),
                _argument_kind(own),
                "required" if own.default is MISSING else "" if own.is_flag else _show_argument(own.default),
                _escape(" ".join(filter(None, (own.about, enum_text(own.kind))))),
            )
            for own in (arguments_of(entry.kind) if entry.kind else [])
        ]
        lines += _markdown(["argument", "type", "default", "meaning"], rows) if rows else []
        if settings is True:
            lines += ["", "`key=value`: settings of the run, as in `megavit train`."]
        elif settings:
            lines += ["", f"`key=value`: {', '.join(f'`{key}`' for key in settings)}."]
    return _NOTE + "\n".join(lines).rstrip() + "\n"


def _argument_kind(own: Argument) -> str:
    if own.is_flag:
        return f"flag with {_kind(own.kind)}" if own.takes_value else "flag"
    return _kind(own.kind) + (" or null" if own.may_be_null else "")


def _wrapped(line: str) -> list[str]:
    """Return a usage line in several lines, none of which ends within brackets."""
    kept = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\u00a0"), line)
    lines = textwrap.wrap(kept, 88, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return [part.replace("\u00a0", " ") for part in lines]


def _show_argument(value: Any) -> str:
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`" if value else ""
    return _show_default(value)


def recipes_page() -> str:
    """Return the list of recipes, each with its command and what its file says of it."""
    names = choices("recipe")
    lines = [
        "# Recipes",
        "",
        f"The {len(names)} complete experiments of `conf/recipe/`; `megavit recipes` lists them too. `recipe=NAME` "
        "sets everything that its file names, and what you type overrides it.",
    ]
    for name in names:
        command, *text = header_lines(config_dir() / "recipe" / f"{name}.yaml")
        lines += ["", f"## {name}", "", "```text", command, "```", "", _escape(" ".join(text).strip())]
    return _NOTE + "\n".join(lines) + "\n"


def stale() -> list[str]:
    """Return the names of the committed pages that differ from what the code says."""
    return [name for name, text in pages().items() if (DOCS / name).read_text() != text]


def main() -> int:
    """Write the pages, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the pages that follow from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 3 if a page is stale")
    if parser.parse_args().check:
        found = stale()
        print("".join(f"docs/{name} is stale: run python docs/generate.py\n" for name in found), end="")
        return FINDINGS if found else 0
    for name, text in pages().items():
        (DOCS / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
