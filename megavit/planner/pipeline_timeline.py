"""In which order pipeline ranks work through a step, and how long they wait for each other, by arithmetic alone.

Time is in ticks of any unit. What is sent is there at once, and nobody waits for it to be taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavit.planner.flops import NetworkShape, embedding_flops, head_flops, layer_flops


@dataclass(frozen=True)
class Pass:
    """One stage's work on one micro batch, forward or backward.

    Attributes:
        stage: of all pp · vpp stages, in the order of the layers; it is on pipeline rank stage mod pp.
        microbatch: of the step, from 0.
        is_backward: gradients, else activations.
    """

    stage: int
    microbatch: int
    is_backward: bool


# What a rank does between two exchanges with its neighbours: it begins when all is there that any of it needs, and what
# it makes is sent at its end.
Turn = tuple[Pass, ...]


@dataclass(frozen=True)
class StageCost:
    """Ticks that a stage works on one micro batch.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, what it recomputes included.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Timeline:
    """When each pass of a step runs.

    Attributes:
        spans: each pass's first tick, and the one after its last.
        busy: ticks that each rank works.
    """

    spans: dict[Pass, tuple[int, int]]
    busy: list[int]

    @property
    def length(self) -> int:
        """Ticks of the whole step."""
        return max(end for _, end in self.spans.values())

    @property
    def idle(self) -> list[int]:
        """Ticks that each rank waits."""
        return [self.length - busy for busy in self.busy]

    @property
    def idle_fraction(self) -> float:
        """Of all ranks' ticks, those that they wait."""
        return sum(self.idle) / (len(self.busy) * self.length)


def order_turns(num_microbatches: int, *, pp: int, vpp: int = 1, overlaps: bool = False) -> list[list[Turn]]:
    """List what each pipeline rank does, in the order in which Megatron-Core does it.

    Forward passes until the first gradient can be there, then a forward and a backward pass in turn (1F1B), then the
    backward passes that are left. An interleaved rank takes pp micro batches through one of its stages, then through
    the next one, and their gradients through its stages the other way round. Unless its exchanges overlap, it makes one
    after each pair of passes: activations leave when the backward pass is done too.

    Args:
        num_microbatches: of the step; in multiples of pp where vpp is above 1.
        pp: pipeline ranks.
        vpp: stages of each.
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
    """Run each rank's turns as early as what they need of other ranks allows.

    A forward pass needs that of the stage before it; a backward pass that of the stage after it, and on the last stage
    its own forward pass.

    Args:
        orders: each rank's turns, from `order_turns` or as a run has logged them.
        costs: of every stage, in the order of the layers.

    Raises:
        ValueError: if the ranks wait for each other in a circle, or for a pass that no rank makes.
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
            raise ValueError(f"the ranks wait for each other, each before its turn: {stuck}")
    return Timeline(spans, busy)


def _needed(due: Pass, *, last: int) -> list[Pass]:
    if not due.is_backward:
        return [Pass(due.stage - 1, due.microbatch, False)] if due.stage > 0 else []
    return [Pass(due.stage + 1, due.microbatch, True) if due.stage < last else Pass(last, due.microbatch, False)]


def even_idle_fraction(num_microbatches: int, *, pp: int, vpp: int = 1) -> float:
    """Of a pipeline's ticks, those that its ranks wait where all stages cost the same: (pp − 1) / (m · vpp + pp − 1).

    Args:
        num_microbatches: m, of the step.
        pp: pipeline ranks.
        vpp: stages of each.

    Source: arXiv 2104.04473, section 2.2, where it is a fraction of the ticks worked, (pp − 1) / (m · vpp).
    """
    return (pp - 1) / (num_microbatches * vpp + pp - 1)


def stage_costs(shape: NetworkShape, stages: Sequence[int], *, recomputes: bool = False) -> list[StageCost]:
    """Each stage's FLOPs for one image, a tick each: its layers, on the first the embedding, on the last what follows.

    Args:
        shape: of a network that is trained as a whole.
        stages: encoder layers of each stage.
        recomputes: whether the backward pass computes every layer again, a decoder's too.
    """
    assert shape.trains_encoder
    costs = []
    for index, num_layers in enumerate(stages):
        layers, besides, embedding = num_layers * layer_flops(shape), 0, 0
        if index == 0:
            embedding = embedding_flops(shape)
        if index == len(stages) - 1:
            decoder = shape.decoder.layers * layer_flops(shape.decoder) if shape.decoder is not None else 0
            layers, besides = layers + decoder, head_flops(shape) - decoder
        forward = layers + besides + embedding
        # Images need no gradient.
        costs.append(StageCost(forward, 2 * forward - embedding + recomputes * layers))
    return costs
