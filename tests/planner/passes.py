"""Log a rank's real schedule in order: every pass, every exchange with a neighbour and every wait for one."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from zlib import crc32

from megavit.planner.pipeline_timeline import Pass, StageCost, Timeline


@dataclass(frozen=True)
class Send:
    """A send to the next rank (`step` 1) or to the previous one (−1).

    The receiving rank's `Wait` of the same step ends it, in the order of the `Receive` events.
    """

    step: int


@dataclass(frozen=True)
class Receive:
    step: int
    number: int


@dataclass(frozen=True)
class Wait:
    number: int


@dataclass
class Log:
    """The log of one training step on one rank.

    Attributes:
        events: events in order.
        entered: checksum of each pass's input tensor, 0 for none.
        left: checksum of each pass's output tensor, 0 for none.
    """

    events: list[Pass | Send | Receive | Wait] = field(default_factory=list)
    entered: dict[Pass, int] = field(default_factory=dict)
    left: dict[Pass, int] = field(default_factory=dict)

    @property
    def passes(self) -> list[Pass]:
        return [event for event in self.events if isinstance(event, Pass)]


@contextmanager
def logged(log: Log, *, pp: int, pp_rank: int) -> Iterator[None]:
    """Log the schedule of Megatron-Core on this rank."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    run_forward, run_backward = schedules.forward_step, schedules.backward_step
    communicate = P2PCommunicator._communicate
    # Keyed by the output's id, all that a backward pass gets. The output is stored, so that no other gets its id.
    forward_of: dict[int, tuple[Pass, Any]] = {}
    numbers = iter(range(10**9))

    def forward_step(*arguments: Any, **named: Any) -> Any:
        answer = run_forward(*arguments, **named)
        made = Pass((named.get("vp_stage") or 0) * pp + pp_rank, named["current_microbatch"], False)
        output = _only(answer[0])
        forward_of[id(output)] = made, output
        log.events.append(made)
        log.entered[made], log.left[made] = _checksum(arguments[4]), _checksum(output)
        return answer

    def backward_step(entered: Any, output: Any, gradient: Any, *rest: Any) -> Any:
        forward, _ = forward_of.pop(id(_only(output)))
        made = Pass(forward.stage, forward.microbatch, True)
        log.entered[made] = _checksum(gradient)
        answer = run_backward(entered, output, gradient, *rest)
        log.events.append(made)
        log.left[made] = _checksum(answer)
        return answer

    def exchange(self: Any, *, wait_on_reqs: bool = True, **named: Any) -> Any:
        receives = {}
        for step, side in ((-1, "prev"), (1, "next")):
            if named[f"tensor_send_{side}"] is not None:
                log.events.append(Send(step))
        for step, side in ((1, "prev"), (-1, "next")):
            if named[f"recv_{side}"]:
                receives[f"recv_{side}"] = next(numbers)
                log.events.append(Receive(step, receives[f"recv_{side}"]))
        *tensors, works = communicate(self, wait_on_reqs=wait_on_reqs, **named)
        if wait_on_reqs:
            log.events += [Wait(number) for number in receives.values()]
            return *tensors, works
        return *tensors, {key: _Awaited(work, receives.get(key), log) for key, work in works.items()}

    with (
        mock.patch.object(schedules, "forward_step", forward_step),
        mock.patch.object(schedules, "backward_step", backward_step),
        mock.patch.object(P2PCommunicator, "_communicate", exchange),
    ):
        yield


class _Awaited:
    """A receive that logs when the schedule waits for it."""

    def __init__(self, work: Any, number: int | None, log: Log) -> None:
        self.work, self.number, self.log = work, number, log

    def wait(self) -> None:
        if self.number is not None:
            self.log.events.append(Wait(self.number))
        self.work.wait()


def _only(tensors: Any) -> Any:
    if not isinstance(tensors, list):
        return tensors
    (tensor,) = tensors
    return tensor


def _checksum(tensors: Any) -> int:
    tensor = _only(tensors)
    return 0 if tensor is None else crc32(tensor.detach().contiguous().numpy().tobytes())


def replay(logs: list[Log], costs: list[StageCost]) -> Timeline:
    """Compute when each pass of a logged step would run at given costs, if each rank keeps its order.

    A rank's clock advances by its passes. A message carries the sender's clock, and the receiver waits until that time.
    """
    clocks, busy, done = ([0] * len(logs) for _ in range(3))
    spans: dict[Pass, tuple[int, int]] = {}
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)
    receives: dict[tuple[int, int], int] = defaultdict(int)
    place: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}
    while any(done[rank] < len(log.events) for rank, log in enumerate(logs)):
        before = sum(done)
        for rank, log in enumerate(logs):
            for event in log.events[done[rank] :]:
                if isinstance(event, Pass):
                    cost = costs[event.stage].backward if event.is_backward else costs[event.stage].forward
                    spans[event] = (clocks[rank], clocks[rank] + cost)
                    clocks[rank] += cost
                    busy[rank] += cost
                elif isinstance(event, Send):
                    sent[(rank + event.step) % len(logs), event.step].append(clocks[rank])
                elif isinstance(event, Receive):
                    place[rank, event.number] = (rank, event.step), receives[rank, event.step]
                    receives[rank, event.step] += 1
                else:
                    line, index = place[rank, event.number]
                    if len(sent[line]) <= index:
                        break
                    clocks[rank] = max(clocks[rank], sent[line][index])
                done[rank] += 1
        assert sum(done) > before, "the log has a wait that nobody's sending ends"
    return Timeline(spans, busy)
