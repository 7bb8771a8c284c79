"""Text of `megavit COMMAND --help`, and of `--help` with the name of a group, a setting or an argument."""

import difflib
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, get_type_hints

from megavit.cli.arguments import arguments_of, describe, is_word
from megavit.cli.cluster_settings import CLUSTER, cluster_defaults, cluster_texts, cluster_types
from megavit.cli.config_flags import ConfigFlags
from megavit.config.experiment import ExperimentConfig
from megavit.config.reference import enum_text, explanations, first_sentence, type_in_words
from megavit.config.search_path import SearchPath, groups, split_search_path
from megavit.config.settings import alternatives, explain_setting, flatten, nearest, run_types
from megavit.errors import ConfigError
from megavit.task.config import TaskConfig
from megavit.task.registry import TASKS, tasks_with
from megavit.validation import format_value

_FLAGS = ("--help", "-h")
_WIDTH = 110


def help_text(
    program: str, kind: type, arguments: list[str], *, about: str, settings: bool | Collection[str] = False
) -> str:
    """Return the text that `--help` prints.

    Args:
        program: the command as typed, such as `megavit train`.
        kind: the dataclass of the command's own arguments.
        arguments: as typed, with `--help` or `--help TOPIC`; a topic's values follow from the settings among them.
        about: what the command does.
        settings: whether the command takes settings of a run; a collection names those that it takes.

    Raises:
        ConfigError: for a topic that does not exist, or a setting that is wrong.
    """
    topic, rest = _split_topic(arguments)
    if topic is None:
        text = describe(program, kind, about=about, settings=settings)
        return "\n".join([text, *_groups(program, kind, rest)]) if settings is True else text
    own = {word: each for each in arguments_of(kind) for word in (each.key, each.key.lstrip("-"), each.short) if word}
    if topic in own:
        return "\n".join([f"{program} {own[topic].usage}", *_wrapped(own[topic].about)])
    if settings is not True:
        known = [*own, *(settings or ())]
        near = difflib.get_close_matches(topic, known, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"it has {', '.join(each.key for each in arguments_of(kind)) or 'none'}"
        )
        raise ConfigError(f"{program} has no argument {topic}; {hint}")
    near = difflib.get_close_matches(topic, own, n=1)
    if near and topic.partition(".")[0] not in _names(program):
        raise ConfigError(f"{program} has no argument {topic}; did you mean {near[0]}?")
    return "\n".join(_topic(program, topic, rest))


def _split_topic(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the word after --help, and what else is typed, without flags of the command's own."""
    at = next(index for index, text in enumerate(arguments) if text.partition("=")[0] in _FLAGS)
    before, after = arguments[:at], arguments[at + 1 :]
    topic = arguments[at].partition("=")[2] or None
    if topic is None and after and is_word(after[0]):
        topic, after = after[0], after[1:]
    return topic, [*before, *after]


def _takes_cluster(program: str) -> bool:
    return program.endswith(" submit")


def _names(program: str) -> list[str]:
    """Return the groups, and the settings that belong to none."""
    names = dict.fromkeys([*groups(), *get_type_hints(ExperimentConfig)])
    return [*names, CLUSTER] if _takes_cluster(program) else list(names)


def _groups(program: str, kind: type, rest: list[str]) -> Iterator[str]:
    """List the groups of settings with their choices."""
    if issubclass(kind, ConfigFlags):
        search = _search(rest)
        yield from ("", "groups")
        for name in _names(program):
            choices = search.choices(name) if name in (*groups(), CLUSTER) else []
            # Lines are broken at the bars.
            text = f"  {name}={'| '.join(choices)}" if choices else f"  {name}"
            yield from (line.replace("| ", "|") for line in textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 6))
    yield from (
        "",
        f"{program} --help GROUP shows the settings of a group, and --help KEY one of them, such as model.drop_path",
    )


def _search(rest: list[str]) -> SearchPath:
    return split_search_path(_settings_of(rest))[0]


def _settings_of(rest: list[str]) -> list[str]:
    """Return the settings of a command line, with the flags that belong to them."""
    words, found = iter(rest), []
    shorts = {"-cd": "--config-dir", "-cn": "--config-name"}
    for text in words:
        key, sign, value = text.partition("=")
        flag = shorts.get(key, key)
        if flag in ("--config-dir", "--config-name", "--start-time"):
            found.append(f"{flag}={value if sign else next(words, '')}")
        elif not key.startswith("-") and sign and not text.startswith("cluster"):
            found.append(text)
    return found


def _topic(program: str, topic: str, rest: list[str]) -> Iterator[str]:
    """Describe a group or a setting, with the values that the other words of the command line lead to."""
    # Not at the top: only this needs Hydra.
    from megavit.config.compose import compose

    of_cluster = _takes_cluster(program) and topic.partition(".")[0] == CLUSTER
    types, texts = (cluster_types(), cluster_texts()) if of_cluster else (run_types(), _texts())
    keys = [key for key in types if key == topic or key.startswith(f"{topic}.")]
    if not keys and topic not in groups():
        near = nearest(topic, types) if of_cluster else []
        meant = f"did you mean {alternatives(near)}?" if near else f"{program} --help {CLUSTER} shows those that do"
        message = f"{topic} does not exist; {meant}" if of_cluster else explain_setting(topic, groups=groups())
        raise ConfigError(f"--help {topic}: {message}")
    typed = _settings_of(rest)
    if topic in (*groups(), CLUSTER):
        yield from _choices(topic, _search(rest))
    values = cluster_defaults() if of_cluster else flatten(compose(typed))
    if keys and topic not in types:
        of = "defaults" if of_cluster else f"values of {' '.join(['megavit train', *typed])}"
        yield f"settings, with the {of}"
    for key in keys:
        yield from _setting(key, types[key], texts.get(key, ""), values)
    if topic in types and "." in topic:
        yield from ("", f"{program} --help {topic.partition('.')[0]} shows all settings of the group")


def _choices(group: str, search: SearchPath) -> Iterator[str]:
    names = search.choices(group)
    width = min(30, max(len(f"{group}={name}") for name in names)) + 2
    yield "choices"
    for name in names:
        file = search.file_of(f"{group}/{name}")
        text = first_sentence(file) if file is not None else ""
        first, indent = f"  {f'{group}={name}':<{width}}", " " * (width + 2)
        yield from textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=indent) or [first.rstrip()]
    yield ""


def _setting(key: str, kind: Any, text: str, values: dict[str, Any]) -> Iterator[str]:
    tasks = tasks_with(key.removeprefix("task.")) if key.startswith("task.") and key not in values else []
    of_tasks = f"; task={'|'.join(tasks)}" if tasks else ""
    value = f"={_typed(values[key])}" if key in values else ""
    yield f"  {key}{value}  ({type_in_words(kind)}{of_tasks})"
    yield from _wrapped(" ".join(filter(None, (text, enum_text(kind)))))


def _typed(value: Any) -> str:
    """Return a value as a user types it."""
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, list | tuple) else str(format_value(value))


def _wrapped(text: str) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _texts() -> dict[str, str]:
    """Return the explanation of each setting of a run by its path."""
    found = explanations(ExperimentConfig)
    for name, kind in get_type_hints(ExperimentConfig).items():
        if hasattr(kind, "__dataclass_fields__"):
            kinds = [row.config for row in TASKS.values()] if kind is TaskConfig else [kind]
            found |= {f"{name}.{key}": text for each in kinds for key, text in explanations(each).items()}
    return found
