"""Train small runs for the tests of the commands that read them, and run these commands in a rank's process."""

import contextlib
import io
from pathlib import Path
from unittest import mock

from tests.distributed import run_ranks
from tests.reference import SMALL


def train_small(run_dir: Path, *overrides: str) -> Path:
    """Train a few steps on the digits, with shifted training images."""
    keys = [
        *SMALL,
        "model.num_layers=2",
        "data.random_shift=1",
        "train.steps=20",
        "train.global_batch=64",
        "optim.lr=3e-3",
    ]
    train([*keys, "train.micro_batch=64", *overrides, f"run.dir={run_dir}"])
    return run_dir


def train(overrides: list[str], *, ranks: int = 1) -> None:
    """Train a complete run, on ranks that the tests keep running."""
    run_ranks(_train, ranks, overrides)


def _train(overrides: list[str]) -> None:
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    validate(config, world_size_from_environment())
    Trainer(config).run()


def run_command(*arguments: object, folder: Path | None = None) -> tuple[int, str, str]:
    """Run a command line in a separate process that the tests keep running; return exit code, output, errors.

    Args:
        arguments: without `megavit`.
        folder: where it is typed; None for wherever that process stands.
    """
    return run_ranks(_command, 1, [str(argument) for argument in arguments], folder)[0]


def _command(arguments: list[str], folder: Path | None) -> tuple[int, str, str]:
    from megavit.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder or Path.cwd()),
        mock.patch("sys.argv", ["megavit", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main()
    return code, out.getvalue(), err.getvalue()


def refusal(*arguments: object) -> str:
    """Return the one-line error of wrong input; check its exit code 2."""
    code, _, err = run_command(*arguments)
    assert code == 2, err
    assert err.startswith("megavit: ")
    assert err.count("megavit: ") == err.count("\n") == 1, err
    return err
