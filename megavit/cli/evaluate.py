"""Check the configuration, then evaluate a run in this process or on several ranks (`megavit evaluate from=RUN`).

Each rank runs `python -m megavit.cli.evaluate`. The network is imported only after warnings are silenced.
"""

import os
import sys
from dataclasses import dataclass

from megavit.cli.arguments import argument, parse
from megavit.config.overrides import write_text
from megavit.runtime.exit_handler import run_rank
from megavit.runtime.signals import unblock
from megavit.runtime.startup import gc_paused, silence_import_warnings


@dataclass(frozen=True)
class EvaluateArgs:
    """The command's own arguments.

    Attributes:
        from_: a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.
    """

    from_: str = argument(form="RUN")


def evaluate(args: EvaluateArgs, settings: list[str]) -> int:
    """Check the run's configuration with the command line's settings, then start the ranks.

    Raises:
        ConfigError: if there is no checkpoint, or a setting is wrong.
    """
    with gc_paused():
        from megavit.inference.run_config import prepare
        from megavit.runtime.workers import num_ranks, start_ranks

    config, _ = prepare(args.from_, settings)
    ranks = num_ranks(config)
    prepare(args.from_, settings, world_size=ranks)
    arguments = [write_text("from", args.from_), *settings]
    if ranks > 1:
        return start_ranks([*arguments, f"run.ranks={ranks}"], ranks=ranks, module="megavit.cli.evaluate")
    return main(arguments)


def main(arguments: list[str]) -> int:
    """Evaluate on one of the ranks that a launcher has started."""
    unblock()
    silence_import_warnings()

    def work() -> int:
        with gc_paused():
            from megavit.inference.evaluate import evaluate
            from megavit.inference.run_config import prepare
            from megavit.parallel.layout import world_size_from_environment

        args, settings = parse("megavit evaluate", EvaluateArgs, arguments, settings=True)
        return evaluate(*prepare(args.from_, settings, world_size=world_size_from_environment()))

    return run_rank(work, run_dir=lambda: None)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's teardown (see megavit.train).
    os._exit(code)
