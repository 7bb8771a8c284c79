"""Record the signals that request a stop, and let all ranks stop after the same step."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Slurm, Kubernetes and a terminal request a stop with these signals.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A rank that receives this signal writes its stack trace to its log (see `RankLog`).
STACK = signal.SIGUSR2

# Signals that are blocked while a run starts.
HELD_BACK = (*STOPPING, STACK)

_LEFT_AT_ONCE = 1


def unblock() -> None:
    """Restore the default effect of the signals that the launcher has blocked, for work that needs no save."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _leave_process() -> None:
    sys.stderr.write("megavit: ended at once; the last checkpoint is valid, run again to continue from it\n")
    sys.stderr.flush()
    os._exit(_LEFT_AT_ONCE)


class StopRequest:
    """Record which signal has requested this process to stop, if any.

    Args:
        on_second: called at the second SIGINT.
    """

    def __init__(self, *, on_second: Callable[[], object] = _leave_process) -> None:
        self.asked_by: str | None = None
        self._on_second = on_second

    def listen(self) -> None:
        """Record signals from now on, including those that arrived while the launcher blocked them.

        A second SIGINT ends the process immediately.
        """
        for number in STOPPING:
            signal.signal(number, self._take_note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals while the body runs, then restore the handlers; outside the main thread, do nothing."""
        with handlers_restored() as may_listen:
            if may_listen:
                self.listen()
            yield

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked_by == "SIGINT":
            self._on_second()
        self.asked_by = signal.Signals(number).name


@contextmanager
def handlers_restored() -> Iterator[bool]:
    """Restore the handlers of `STOPPING` after the body; yield whether this thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield True
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class StopConsensus:
    """Combine over all ranks, once a step, whether a stop was requested and whether a checkpoint is being written.

    A signal may reach one rank only, and one disk may be slower than another. The all-reduce of a step is read at the
    end of the next one, so that no rank waits for it.

    Args:
        request: this rank's stop request.
        world_size: number of ranks.
    """

    def __init__(self, request: StopRequest, *, world_size: int) -> None:
        self._request, self._alone = request, world_size == 1
        self._ballot: Any = None
        self._count: Any = None

    def start(self, *, is_writing: bool) -> None:
        """Start this step's all-reduce.

        Args:
            is_writing: whether this rank is still writing a checkpoint.
        """
        import torch
        import torch.distributed as dist

        self._ballot = torch.tensor([self._request.asked_by is not None, is_writing], dtype=torch.int32)
        if not self._alone:
            self._count = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, async_op=True)

    def result(self) -> tuple[bool, bool]:
        """Return the result of the last all-reduce, which is the same on every rank.

        Call this after the last step too, so that no all-reduce stays pending.

        Returns:
            Whether any rank has a stop request; whether no rank was writing a checkpoint.
        """
        if self._ballot is None:
            return False, False
        if self._count is not None:
            self._count.wait()
        wants_stop, is_writing = self._ballot.tolist()
        self._ballot, self._count = None, None
        return bool(wants_stop) or (self._alone and self._request.asked_by is not None), not is_writing
