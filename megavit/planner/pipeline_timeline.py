"""Simulate the order of a step's passes on the pipeline ranks and their idle time, without torch.

Time is in ticks of any unit. Messages arrive at once, and senders do not wait for receivers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavit.planner.flops import NetworkShape, embedding_flops, head_flops, layer_flops


@dataclass(frozen=True)
class Pass:
    """One stage's work on one micro batch, forward or backward.

    Attributes:
        stage: index among all pp · vpp stages, in the order of the layers; held by pipeline rank stage mod pp.
        microbatch: index of the micro batch within the step, from 0.
        is_backward: whether it is the backward pass.
    """

    stage: int
    microbatch: int
    is_backward: bool


# A rank's passes between two exchanges with its neighbours. They start when the inputs of all of them have arrived, and
# their results are sent when all of them are done.
Turn = tuple[Pass, ...]


@dataclass(frozen=True)
class StageCost:
    """A stage's working time for one micro batch, in ticks.

    Attributes:
        forward: ticks of the forward pass.
        backward: ticks of the backward pass, recompute included.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Timeline:
    """The times of a step's passes.

    Attributes:
        spans: each pass's first tick, and the tick after its last.
        busy: working ticks of each rank.
    """

    spans: dict[Pass, tuple[int, int]]
    busy: list[int]

    @property
    def length(self) -> int:
        """Return the ticks of the full step."""
        return max(end for _, end in self.spans.values())

    @property
    def idle(self) -> list[int]:
        """Return the idle ticks of each rank."""
        return [self.length - busy for busy in self.busy]

    @property
    def idle_fraction(self) -> float:
        """Return the fraction of all ranks' ticks that are idle."""
        return sum(self.idle) / (len(self.busy) * self.length)


def order_turns(num_microbatches: int, *, pp: int, vpp: int = 1, overlaps: bool = False) -> list[list[Turn]]:
    """List each pipeline rank's passes in the order in which Megatron-Core runs them.

    Forward passes until the first gradient can arrive, then one forward and one backward pass alternately (1F1B), then
    the remaining backward passes. An interleaved rank runs pp micro batches through one of its stages, then through the
    next one, and their gradients in reverse order of stages. Unless its exchanges overlap, it exchanges once after each
    pair of passes: activations are sent only when the backward pass is done too.

    Args:
        num_microbatches: micro batches per step; a multiple of pp if vpp is above 1.
        pp: pipeline ranks.
        vpp: stages per pipeline rank.
        overlaps: whether an interleaved rank sends and receives while it computes (`parallel.overlap_p2p`).

    Source: Megatron-LM, megatron/core/pipeline_parallel/schedules.py (0.16.1); arXiv 2104.04473, section 2.2.
    """
    assert vpp == 1 or num_microbatches % pp == 0, "an interleaved pipeline takes micro batches in multiples of pp"
    group = pp if vpp > 1 else num_microbatches
    places = [
        (chunk, microbatch)
        for first in range(0, num_microbatches, group)
        for chunk in range(vpp)
        for microbatch in range(first, first + group)
    ]
    orders = []
    for rank in range(pp):
        forward = [Pass(chunk * pp + rank, microbatch, False) for chunk, microbatch in places]
        backward = [Pass((vpp - 1 - chunk) * pp + rank, microbatch, True) for chunk, microbatch in places]
        ahead = pp - 1 - rank if vpp == 1 else 2 * (pp - 1 - rank) + (vpp - 1) * pp
        ahead = min(ahead, len(places))
        pairs: list[Turn] = list(zip(forward[ahead:], backward, strict=False))
        if vpp == 1 or overlaps:
            pairs = [(one,) for pair in pairs for one in pair]
        left = backward[len(places) - ahead :]
        orders.append([*((one,) for one in forward[:ahead]), *pairs, *((one,) for one in left)])
    return orders


def simulate(orders: Sequence[Sequence[Turn]], costs: Sequence[StageCost]) -> Timeline:
    """Run each rank's turns as early as their inputs allow.

    A forward pass needs the forward pass of the previous stage; a backward pass needs the backward pass of the next
    stage, and on the last stage its own forward pass.

    Args:
        orders: each rank's turns, from `order_turns` or from a run's log.
        costs: cost of every stage, in the order of the layers.

    Raises:
        ValueError: if the ranks deadlock, or wait for a pass that no rank runs.
    """
    last, spans = len(costs) - 1, dict[Pass, tuple[int, int]]()
    sent: dict[Pass, int] = {}
    made, clocks, busy = ([0] * len(orders) for _ in range(3))
    while any(made[rank] < len(order) for rank, order in enumerate(orders)):
        before = sum(made)
        for rank, order in enumerate(orders):
            while made[rank] < len(order):
                turn = order[made[rank]]
                needed = [one for due in turn for one in _needed(due, last=last) if one not in turn]
                if not all(one in sent for one in needed):
                    break
                clocks[rank] = max([clocks[rank], *(sent[one] for one in needed)])
                for due in turn:
                    cost = costs[due.stage].backward if due.is_backward else costs[due.stage].forward
                    spans[due] = (clocks[rank], clocks[rank] + cost)
                    clocks[rank] += cost
                    busy[rank] += cost
                sent.update(dict.fromkeys(turn, clocks[rank]))
                made[rank] += 1
        if sum(made) == before:
            stuck = {rank: order[made[rank]] for rank, order in enumerate(orders) if made[rank] < len(order)}
            raise ValueError(f"the ranks deadlock, each before this turn: {stuck}")
    return Timeline(spans, busy)


def _needed(due: Pass, *, last: int) -> list[Pass]:
    if not due.is_backward:
        return [Pass(due.stage - 1, due.microbatch, False)] if due.stage > 0 else []
    return [Pass(due.stage + 1, due.microbatch, True) if due.stage < last else Pass(last, due.microbatch, False)]


def even_idle_fraction(num_microbatches: int, *, pp: int, vpp: int = 1) -> float:
    """Return a pipeline's idle fraction if all stages cost the same: (pp − 1) / (m · vpp + pp − 1).

    Args:
        num_microbatches: micro batches per step, m.
        pp: pipeline ranks.
        vpp: stages per pipeline rank.

    Source: arXiv 2104.04473, section 2.2, which gives it as a fraction of the working time, (pp − 1) / (m · vpp).
    """
    return (pp - 1) / (num_microbatches * vpp + pp - 1)


def stage_costs(shape: NetworkShape, stages: Sequence[int], *, recomputes: bool = False) -> list[StageCost]:
    """Return each stage's FLOPs for one image, one tick each: its layers, the first with embedding, the last with head.

    Args:
        shape: sizes of a network without frozen weights.
        stages: encoder layers of each stage.
        recomputes: whether the backward pass recomputes every layer, a decoder's too.
    """
    assert shape.trains_encoder
    costs = []
    for index, num_layers in enumerate(stages):
        layers, other, embedding = num_layers * layer_flops(shape), 0, 0
        if index == 0:
            embedding = embedding_flops(shape)
        if index == len(stages) - 1:
            decoder = shape.decoder.layers * layer_flops(shape.decoder) if shape.decoder is not None else 0
            layers, other = layers + decoder, head_flops(shape) - decoder
        forward = layers + other + embedding
        # Images need no gradient.
        costs.append(StageCost(forward, 2 * forward - embedding + recomputes * layers))
    return costs
