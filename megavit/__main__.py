"""`megavit VERB key=value …`."""

import sys
from collections.abc import Callable

from megavit.errors import ConfigError
from megavit.exits import USER_ERROR

_USAGE = """\
megavit VERB key=value …

verbs
  train        train a model; RUN/checkpoints, RUN/metrics.jsonl and RUN/pictures are left in the run's folder
  reconstruct  draw what a masked autoencoder makes of images: from=RUN images=PATH [out=PICTURE.png count=8]

examples
  megavit train                                       the embedded digits: all GPUs, or one CPU process
  megavit train run.ranks=4 parallel.tp=2 parallel.pp=2
  megavit train --cfg                                 show the configuration and start nothing
  megavit train recipe=digits_mae                     a masked autoencoder

Without GPUs the ranks are CPU processes; MEGAVIT_DEVICE=cpu asks for that on a GPU machine too.
Not run on a GPU yet: everything. Layouts were measured on CPU processes, which run the same Megatron-Core code.
"""


def main() -> int:
    """Run the verb on the command line; the exit code is 0 finished, 2 wrong input, 75 stopped and saved, 1 a fault."""
    verbs: dict[str, Callable[[list[str]], int]] = {"train": train, "reconstruct": reconstruct}
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if arguments else USER_ERROR
    verb, *rest = arguments
    if verb not in verbs:
        print(f"megavit: the verb {verb} does not exist; known: {', '.join(verbs)}", file=sys.stderr)
        return USER_ERROR
    if "-h" in rest or "--help" in rest:
        print(_USAGE, end="")
        return 0
    try:
        return verbs[verb](rest)
    except ConfigError as error:
        print(f"megavit: {error}", file=sys.stderr)
        return USER_ERROR


def train(arguments: list[str]) -> int:
    """Check the configuration here, once, then start the ranks."""
    from pathlib import Path

    from megavit.compose import compose, to_yaml
    from megavit.workers import num_ranks, start_ranks

    overrides = [argument for argument in arguments if argument != "--cfg"]
    config = compose(overrides)
    if len(overrides) < len(arguments):
        print(to_yaml(config), end="")
        return 0
    ranks = num_ranks(config)
    config.check(ranks)
    if ranks > 1:
        return start_ranks(overrides, ranks=ranks, run_dir=Path(config.run.dir))
    from megavit.train import main as train_as_rank

    return train_as_rank(overrides)


def reconstruct(arguments: list[str]) -> int:
    """Draw what a masked autoencoder makes of images."""
    from megavit.outcome import quieten_imports

    quieten_imports()
    from megavit.reconstruct import reconstruct as draw

    return draw(arguments)


if __name__ == "__main__":
    sys.exit(main())
