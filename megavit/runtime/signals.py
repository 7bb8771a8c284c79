"""Being asked to stop: signals are taken note of, and acted on between two steps, by all ranks at the same one."""

import os
import signal
import sys
from types import FrameType
from typing import Any

# Slurm, Kubernetes and a terminal ask with these.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# At this one a rank writes its stack into its log (see `RankLog`).
STACK = signal.SIGUSR2

# Held back while a run starts.
HELD_BACK = (*STOPPING, STACK)

_LEFT_AT_ONCE = 1


def unblock() -> None:
    """Let signals do what they always do, where the launcher has held them back and nothing needs saving."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class StopRequest:
    """Whether this process has been asked to stop, and by what."""

    def __init__(self) -> None:
        self.asked_by: str | None = None

    def listen(self) -> None:
        """Take note of signals from now on, those included that the launcher has held back until now.

        A second SIGINT leaves at once.
        """
        for number in STOPPING:
            signal.signal(number, self._take_note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked_by == "SIGINT":
            sys.stderr.write("megavit: left at once; what was saved last is whole, run again to go on from it\n")
            sys.stderr.flush()
            os._exit(_LEFT_AT_ONCE)
        self.asked_by = signal.Signals(number).name


class StopConsensus:
    """What the ranks agree on between two steps: a signal may reach one of them alone, one disk be slower than another.

    The vote of a step is counted at the end of the next one, so that nobody waits for it.

    Args:
        request: this rank's.
        world_size: ranks that vote.
    """

    def __init__(self, request: StopRequest, *, world_size: int) -> None:
        self._request, self._alone = request, world_size == 1
        self._ballot: Any = None
        self._count: Any = None

    def start(self, *, is_writing: bool) -> None:
        """Cast this step's vote.

        Args:
            is_writing: whether this rank still writes a checkpoint.
        """
        import torch
        import torch.distributed as dist

        self._ballot = torch.tensor([self._request.asked_by is not None, is_writing], dtype=torch.int32)
        if not self._alone:
            self._count = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, async_op=True)

    def result(self) -> tuple[bool, bool]:
        """The last vote, on every rank at the same step: whether any rank wants to stop; whether none was writing.

        To be called after the last step too, so that no vote is left under way.
        """
        if self._ballot is None:
            return False, False
        if self._count is not None:
            self._count.wait()
        wants_stop, is_writing = self._ballot.tolist()
        self._ballot, self._count = None, None
        return bool(wants_stop) or (self._alone and self._request.asked_by is not None), not is_writing
