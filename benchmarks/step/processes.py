"""Processes that candidates live in, and are called by name: one, or the ranks of a tensor-parallel pair.

Whoever measures stays outside: it can give up on a process that hangs, and a fault in one leaves the figures whole.
"""

import multiprocessing as mp
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megavit.errors import ConfigError

# Those who hear that they may go do so by themselves, and tidy up.
_LEAVING_S = 5
_DIED = "its process died (often for want of memory)"


# Whoever takes his turn finds the memory that the one before him has freed still there: else glibc gives it back to the
# system at every change, and the first step of a turn is 30 % slower for some and not for others.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


class Fault(Exception):
    """A candidate failed; the text says how."""


class WorkerPool:
    """So many processes that share a row's candidates.

    Args:
        overrides: of the run that megavit would train.
        ranks: processes.
    """

    def __init__(self, overrides: list[str], *, ranks: int = 1) -> None:
        context = mp.get_context("spawn")
        os.environ.update(_KEEP_MEMORY)
        self._workers = []
        # Kept for as long as the processes live.
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
        """Call a method of the stand in every process.

        Args:
            name: of the method.
            arguments: for it.
            until: `time.monotonic()` to wait until.
            patience_s: to wait at least, for what has been begun.

        Returns:
            What the first rank answers; of numbers the largest that any rank gives.

        Raises:
            Fault: if one failed.
            TimeoutError: if one did not answer in time.
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
        # The profiler's own log, with an error where there is no GPU.
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
