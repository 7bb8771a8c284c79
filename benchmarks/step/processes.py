"""Run candidates in worker processes, one or two tensor-parallel ranks, and call their methods by name.

The measuring process stays outside: it can give up on a worker that hangs, and a worker's fault loses no figures.
"""

import multiprocessing as mp
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megavit.errors import ConfigError

# Seconds in which workers may end by themselves and clean up after their pipe is closed.
_LEAVING_S = 5
_DIED = "its process died (often for want of memory)"


# Make glibc keep freed memory for the next candidate. Otherwise it returns the memory to the system at each change, and
# the first step of a turn is 30 % slower for some candidates and not for others.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


class Fault(Exception):
    """A candidate failed, for the reason in the text."""


class WorkerPool:
    """The worker processes that hold a row's candidates.

    Args:
        overrides: settings of megavit's run.
        ranks: number of processes.
    """

    def __init__(self, overrides: list[str], *, ranks: int = 1) -> None:
        context = mp.get_context("spawn")
        os.environ.update(_KEEP_MEMORY)
        self._workers = []
        # The store must exist as long as the processes do.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, overrides, rank, ranks, self._store.port), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def call(self, name: str, *arguments: Any, until: float, patience_s: float = 0.0) -> Any:
        """Call a method of `CaseRunner` in every process.

        Args:
            name: name of the method.
            arguments: arguments of the method.
            until: `time.monotonic()` to wait until.
            patience_s: shortest time to wait, in seconds.

        Returns:
            The first rank's result; if results are floats, the largest of all ranks.

        Raises:
            Fault: if a process failed.
            TimeoutError: if a process did not answer in time.
        """
        try:
            for _, pipe in self._workers:
                pipe.send((name, arguments))
        except OSError as error:
            raise Fault(_DIED) from error
        deadline = max(until, time.monotonic() + patience_s)
        answers = []
        for _, pipe in self._workers:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            try:
                good, answer = pipe.recv()
            except EOFError:
                good, answer = False, _DIED
            if not good:
                raise Fault(answer)
            answers.append(answer)
        return max(answers) if isinstance(answers[0], float) else answers[0]

    def close(self) -> None:
        """End the processes."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(_LEAVING_S)
            process.kill()
            process.join()


def _serve(pipe: Connection, overrides: list[str], rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        # Silence the profiler's own log, which has an error on machines without a GPU.
        KINETO_LOG_LEVEL="99",
    )
    from megavit.runtime.startup import gc_paused, silence_import_warnings

    silence_import_warnings()
    runner: Any = None
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if runner is None:
                with gc_paused():
                    from benchmarks.step.runner import CaseRunner

                runner = CaseRunner(overrides)
            answer = (True, getattr(runner, name)(*arguments))
        except ConfigError as error:
            answer = (False, str(error))
        except Exception as error:
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        pipe.send(answer)
