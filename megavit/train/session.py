"""Train from Python: in this process, which is afterwards as it was, or in processes of several ranks."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from megavit.config.experiment import ExperimentConfig
from megavit.errors import DISK_ERRORS, ConfigError, disk_full
from megavit.parallel.layout import temporary_world, world_size_from_environment
from megavit.runtime.run_dir import FAULT, USER_ERROR, claim_folder, write_exit
from megavit.runtime.signals import StopRequest
from megavit.runtime.startup import import_warnings_silenced


def train_here(config: ExperimentConfig) -> int:
    """Train as the only rank, in this process, and leave it as it was.

    The first SIGINT saves and stops, as SIGTERM and SIGUSR1 do; the second one raises KeyboardInterrupt. In a thread
    other than the main one no signal is listened to.

    Args:
        config: the run's, checked for one rank.

    Returns:
        The exit code of the command: 0, or 75 where the run was stopped and has saved.

    Raises:
        ConfigError: for wrong settings or data, a folder in use, or a disk that is full.
        Exception: any other fault, as it is.
    """
    run_dir = Path(config.run.dir)
    stop = StopRequest(on_second=_interrupt)
    with ExitStack() as restored:
        restored.enter_context(stop.listening())
        restored.enter_context(claim_folder(run_dir))
        restored.enter_context(_exit_written(run_dir))
        restored.enter_context(process_restored())
        from megavit.train.trainer import Trainer

        code = Trainer(config, stop=stop).run()
        write_exit(run_dir, code, None)
    return code


def refuse_launcher(name: str) -> None:
    """Raise ConfigError where torchrun has started this process as one of several ranks."""
    if world_size_from_environment() > 1:
        raise ConfigError(
            f"{name} starts its ranks itself, and WORLD_SIZE={world_size_from_environment()} ranks were started; run "
            f"the script once, without torchrun, with run.ranks=N, or start torchrun -m megavit.train"
        )


@contextmanager
def process_restored() -> Iterator[None]:
    """Restore, after the body, what computing in this process changes: warnings, loggers, torch's default generators,
    its number of threads, and torch.distributed.

    After an error megavit's frames are emptied, so that a notebook, which keeps the traceback, does not keep the
    network.
    """
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with import_warnings_silenced(), temporary_world(), torch.random.fork_rng(devices=devices):
            try:
                yield
            except BaseException as error:
                _empty_frames(error.__traceback__)
                raise
    finally:
        torch.set_num_threads(threads)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def _exit_written(run_dir: Path) -> Iterator[None]:
    """Leave the exit code of an error in the run's folder, as the command does."""

    def leave(code: int, message: str) -> None:
        with suppress(OSError):
            write_exit(run_dir, code, message)

    try:
        yield
    except ConfigError as error:
        leave(USER_ERROR, f"megavit: {error}")
        raise
    except BaseException as error:
        if not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
            leave(FAULT, traceback.format_exc())
            raise
        text = disk_full(error)
        leave(USER_ERROR, f"megavit: {text}")
        raise ConfigError(text) from error


def _empty_frames(trace: TracebackType | None) -> None:
    """Drop the local variables of megavit's functions that an error has left; the user's own keep theirs."""
    while trace is not None:
        frame = trace.tb_frame
        if str(frame.f_globals.get("__name__")).startswith(("megavit.", "megatron.")):
            # Those that still execute refuse.
            with suppress(RuntimeError):
                frame.clear()
        trace = trace.tb_next


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
