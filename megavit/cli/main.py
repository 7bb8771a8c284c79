"""`megavit VERB key=value …`."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from megavit import __version__
from megavit.config.untested import list_untested
from megavit.config.validate import validate
from megavit.errors import ConfigError, escape_unprintable
from megavit.runtime.run_dir import FAULT, USER_ERROR
from megavit.validation import suggest

_USAGE = """\
megavit VERB key=value …     megavit --version

verbs
  train        train a model; RUN/checkpoints, RUN/metrics.jsonl and RUN/pictures are left in the run's folder
  evaluate     a checkpoint over the validation set, in any layout: from=RUN [key=value …]
  predict      names and probabilities for images: from=RUN images=PATH [out=FILE.csv|FILE.jsonl top=5]
  reconstruct  draw what a masked autoencoder makes of images: from=RUN images=PATH [out=PICTURE.png count=8]
  features     a vector for each image, as safetensors: from=RUN out=FOLDER [splits=train,val pool=cls|mean]
               [key=value …]
  knn          validation images named by their nearest training images, as features lie: from=RUN [k=10,20,100
               temperature=0.07 pool=cls|mean out=FILE.json] [key=value …]
  fewshot      a linear classifier of features learned from a few images of each class: from=RUN [shots=1,5,10 draws=5
               seed=0 pool=cls|mean out=FILE.json] [key=value …]
  inspect      what a run or a checkpoint is: from=PATH
  verify       read every byte of a run's checkpoints, or of one, and say what is broken: from=PATH
  prune        remove a run's older checkpoints: from=RUN keep_last=N [keep_every=STEPS]
  convert      weights from elsewhere into a run: from=timm:FILE|hf:FOLDER_OR_ID|mae:FILE|nemo:FILE to=RUN
               [num_heads=N]; a run's into theirs: from=RUN to=timm:FILE|hf:FOLDER|mae:FILE|nemo:FILE
               [dtype=fp32|bf16|fp16] [push=ORG/NAME]
  show-data    draw the first training images as the network will see them, beside what they were: key=value …
               [out=PICTURE.png count=16]
  recipes      the complete experiments that come with megavit
  submit       a run as a job, checked here first: cluster=local|slurm|kubernetes|azureml|FILE.yaml [cluster.KEY=VALUE …
               cluster.dry_run=true --multirun] key=value …
  doctor       whether training can start here: packages, devices, attention kernels, the all-reduce across ranks and
               its bandwidth, the run's folder; exit code 1 if it cannot: [run.ranks=N run.dir=FOLDER|run.name=NAME
               run.timeout_s=60 out=FILE.json|-]; across nodes torchrun … -m megavit.cli.doctor.rank

RUN is a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.

examples
  megavit train                                       the embedded digits: all GPUs, or one CPU process
  megavit train run.ranks=4 parallel.tp=2 parallel.pp=2
  megavit train --cfg                                 show the configuration and start nothing
  megavit train recipe=digits_mae                     a masked autoencoder
  megavit evaluate from=runs/digits run.ranks=2 parallel.tp=2

Without GPUs the ranks are CPU processes; MEGAVIT_DEVICE=cpu asks for that on a GPU machine too.
Not run on a GPU yet: everything. Layouts were measured on CPU processes, which run the same Megatron-Core code. On a
GPU a run names those of these settings that it uses, and goes on:
"""

# Verbs that look at what there is, in this process: module and function.
_COMMANDS = {
    "predict": "megavit.cli.predict:predict",
    "reconstruct": "megavit.cli.reconstruct:reconstruct",
    "features": "megavit.cli.features:features",
    "knn": "megavit.cli.knn:knn",
    "fewshot": "megavit.cli.fewshot:fewshot",
    "inspect": "megavit.cli.inspect:inspect_run",
    "verify": "megavit.cli.checkpoints:verify",
    "prune": "megavit.cli.checkpoints:prune",
    "convert": "megavit.cli.convert:convert",
    "show-data": "megavit.cli.show_data:show_data",
    "recipes": "megavit.cli.recipes:list_recipes",
    "submit": "megavit.cli.submit:submit",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the verb on the command line; the exit code is 0 finished, 2 wrong input, 75 stopped and saved, 1 a fault.

    Args:
        arguments: the verb and its own; None takes the command line's.
    """
    escape_unprintable()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"megavit: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("megavit: interrupted", file=sys.stderr)
        return FAULT
    except BrokenPipeError:
        # Whoever read our output, `head` for one, has had enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    starting: dict[str, Callable[[list[str]], int]] = {"train": train, "evaluate": evaluate, "doctor": doctor}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"megavit {__version__} (torch {_version('torch')}, megatron-core {_version('megatron-core')})")
        return 0
    command, *rest = arguments
    if command == "bench" or any(text.startswith("bench.") for text in rest):
        raise ConfigError("the benchmark left the package: now `make bench`, or python -m benchmarks.step in a clone")
    if command not in starting and command not in _COMMANDS:
        known = [*starting, *_COMMANDS]
        near = suggest(command, known)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        print(f"megavit: the verb {command} does not exist; {hint}", file=sys.stderr)
        return USER_ERROR
    if "-h" in rest or "--help" in rest:
        _print_usage()
        return 0
    return starting[command](rest) if command in starting else _run_command(command, rest)


def _version(package: str) -> str:
    """A package's version, by what is installed: to import torch would take seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print_usage() -> None:
    print(_USAGE, *(f"  {option}\n" for option in list_untested()), sep="", end="")


def train(arguments: list[str]) -> int:
    """Check the configuration here, once, then start the ranks."""
    import signal
    from pathlib import Path

    from megavit.runtime.signals import HELD_BACK

    # Held back until the run listens: asked to stop while it still imports, it stops where it stands.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)

    from megavit.config.compose import AUTO_MODEL, compose, to_yaml
    from megavit.runtime.workers import num_ranks, start_ranks

    overrides = [argument for argument in arguments if argument != "--cfg"]
    if AUTO_MODEL in overrides:
        from megavit.train.auto_model import resolve_auto

        overrides, taken = resolve_auto(overrides)
        print(f"# {taken}" if "--cfg" in arguments else taken, flush=True)
    config = compose(overrides)
    if "--cfg" in arguments:
        print(to_yaml(config), end="")
        return 0
    ranks = num_ranks(config)
    validate(config, ranks)
    if ranks > 1:
        return start_ranks(overrides, ranks=ranks, run_dir=Path(config.run.dir))
    from megavit.train.__main__ import main as train_as_rank

    return train_as_rank(overrides)


def evaluate(arguments: list[str]) -> int:
    """Look at the run's configuration here, once, then start the ranks."""
    from megavit.runtime.startup import gc_paused, silence_import_warnings

    silence_import_warnings()
    with gc_paused():
        from megavit.cli.arguments import prepare
        from megavit.runtime.workers import num_ranks, start_ranks

    config, _ = prepare("evaluate", arguments)
    ranks = num_ranks(config)
    prepare("evaluate", arguments, world_size=ranks)
    if ranks > 1:
        return start_ranks([*arguments, f"run.ranks={ranks}"], ranks=ranks, module="megavit.cli.evaluate")
    from megavit.cli.evaluate import main as evaluate_as_rank

    return evaluate_as_rank(arguments)


def doctor(arguments: list[str]) -> int:
    """Look at this machine; torch may be missing or broken, so nothing is imported beforehand."""
    from megavit.cli.doctor.command import doctor as look_at_machine

    return look_at_machine(arguments)


def _run_command(command: str, arguments: list[str]) -> int:
    """Run a verb that starts no ranks."""
    from importlib import import_module

    from megavit.runtime.startup import gc_paused, silence_import_warnings

    silence_import_warnings()
    module, _, function = _COMMANDS[command].partition(":")
    with gc_paused():
        look = getattr(import_module(module), function)
    return look(arguments)


if __name__ == "__main__":
    sys.exit(main())
