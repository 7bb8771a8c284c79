"""`megavit COMMAND key=value …`: one table of commands, from which help and hints are made."""

import difflib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, get_type_hints

from megavit import __version__
from megavit.cli.arguments import NoArguments, parse
from megavit.config.untested import list_untested
from megavit.errors import ConfigError, escape_unprintable
from megavit.runtime.run_dir import FAULT, FINISHED, USER_ERROR
from megavit.runtime.startup import gc_paused, silence_import_warnings


class Command(NamedTuple):
    """A row of `COMMANDS`.

    The function returns the exit code. Its parameter `args`, if it has one, is annotated with the dataclass of the
    command's own arguments; its parameter `settings` receives the other `key=value` as typed.

    Attributes:
        module: module below `megavit.cli`, or a full name with dots.
        function: name of the function in it.
        help: what the command does, in one line.
    """

    module: str
    function: str
    help: str


COMMANDS = {
    "train": Command("train", "train", "train a model; checkpoints, metrics and pictures go to the run's folder"),
    "evaluate": Command(
        "evaluate", "evaluate", "compute the metrics of a checkpoint on the validation set, in any layout"
    ),
    "predict": Command("predict", "predict", "classify images: class names and probabilities"),
    "reconstruct": Command("reconstruct", "reconstruct", "draw what a masked autoencoder reconstructs of images"),
    "features": Command("features", "features", "write a feature vector for each image, as safetensors"),
    "knn": Command("knn", "knn", "classify validation images by their nearest training images in feature space"),
    "fewshot": Command("fewshot", "fewshot", "fit a linear classifier on the features of a few images of each class"),
    "inspect": Command("inspect", "inspect_run", "describe a run or a checkpoint without reading its weights"),
    "verify": Command("checkpoints", "verify", "read every byte of a run's checkpoints; exit code 3 if one is broken"),
    "prune": Command("checkpoints", "prune", "remove older checkpoints of a run"),
    "convert": Command("convert", "convert", "convert weights from and to timm, Hugging Face, MAE and NeMo"),
    "show-data": Command(
        "show_data", "show_data", "draw training images next to the inputs that the network receives of them"
    ),
    "recipes": Command("recipes", "list_recipes", "list the complete experiments that come with megavit"),
    "config": Command(
        "new_recipe", "config", "config new FILE.yaml: write a recipe of one's own, every setting explained"
    ),
    "submit": Command("submit", "submit", "check a run here and submit it as a job to a cluster"),
    "doctor": Command(
        "doctor.command", "doctor", "check whether training can start on this machine; exit code 3 if it cannot"
    ),
}

_EXAMPLES = """\
megavit COMMAND --help shows a command's own arguments. RUN is a run's folder or one of its checkpoints; ema:RUN is the
moving average of its weights.

examples
  megavit train                                       the embedded digits: all GPUs, or one CPU process
  megavit train run.ranks=4 parallel.tp=2 parallel.pp=2
  megavit train --cfg                                 show the configuration and start nothing
  megavit train --help model                          explain each setting of a group
  megavit train recipe=digits_mae                     a masked autoencoder
  megavit evaluate from=runs/digits run.ranks=2 parallel.tp=2

exit codes: 0 finished, 1 a fault, 2 wrong settings or data, 3 findings (verify, doctor), 75 stopped and saved

Without GPUs the ranks are CPU processes; MEGAVIT_DEVICE=cpu asks for that on a GPU machine too.
Not run on a GPU yet: everything. Layouts were measured on CPU processes, which run the same Megatron-Core code. On a
GPU a run names those of these settings that it uses, and continues:
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code (see `megavit.runtime.run_dir`).

    Args:
        arguments: the command and its own; None takes the command line's.
    """
    escape_unprintable()
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"megavit: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("megavit: interrupted", file=sys.stderr)
        return FAULT
    except BrokenPipeError:
        # The reader of our output, `head` for one, has ended; Python would report that once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINISHED


def usage() -> str:
    """Return the text of `megavit --help`."""
    lines = [
        "megavit COMMAND key=value …",
        "megavit --version",
        "megavit --shell-completion install=bash|zsh|fish",
        "",
        "commands",
    ]
    for name, command in COMMANDS.items():
        lines += textwrap.wrap(command.help, 104, initial_indent=f"  {name:<13}", subsequent_indent=" " * 15)
    options = "".join(f"  {option}\n" for option in list_untested())
    return "\n".join([*lines, "", _EXAMPLES]) + options


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        ConfigError: for wrong settings or data.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return FINISHED if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"megavit {__version__} (torch {_version('torch')}, megatron-core {_version('megatron-core')})")
        return FINISHED
    name, *rest = arguments
    if name in ("--shell-completion", "-sc"):
        # Not at the top: only this needs every setting's type.
        from megavit.cli import shell_completion

        shell_completion.run(rest, {name: (full_name(row.module), row.function) for name, row in COMMANDS.items()})
        return FINISHED
    if name == "bench" or any(text.startswith("bench.") for text in rest):
        raise ConfigError("the benchmark left the package: now `make bench`, or python -m benchmarks.step in a clone")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        raise ConfigError(f"the command {name} does not exist; {hint}")
    return LoadedCommand.of(COMMANDS[name]).run(f"megavit {name}", rest, about=COMMANDS[name].help)


@dataclass(frozen=True)
class LoadedCommand:
    """A command's function, imported.

    Attributes:
        function: the function.
        kind: the dataclass of its own arguments; None if it has no parameter `args`.
        takes_settings: whether it has a parameter `settings`.
    """

    function: Callable[..., int]
    kind: type | None
    takes_settings: bool

    @classmethod
    def of(cls, command: Command) -> "LoadedCommand":
        silence_import_warnings()
        with gc_paused():
            function = getattr(import_module(full_name(command.module)), command.function)
        parameters = inspect.signature(function).parameters
        kind = get_type_hints(function)["args"] if "args" in parameters else None
        return cls(function, kind, "settings" in parameters)

    def run(self, program: str, arguments: list[str], *, about: str) -> int:
        kind: type = self.kind or NoArguments
        # A command that takes some settings only names them in its dataclass.
        settings = getattr(kind, "SETTINGS", self.takes_settings)
        if any(text.partition("=")[0] in ("-h", "--help") for text in arguments):
            # Not at the top: the other commands do not need every setting's type.
            from megavit.cli.help import help_text

            print(help_text(program, kind, arguments, about=about, settings=settings))
            return FINISHED
        args: Any
        args, rest = parse(program, kind, arguments, settings=settings)
        given = {"args": args} if self.kind is not None else {}
        return self.function(**given, **({"settings": rest} if self.takes_settings else {}))


def full_name(module: str) -> str:
    """Return the name of a command's module, which the table shortens."""
    return module if module.startswith("megavit.") else f"megavit.cli.{module}"


def _version(package: str) -> str:
    """A package's version, by what is installed: to import torch would take seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
