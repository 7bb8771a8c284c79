"""Compute the bytes that one rank sends and receives in a training step, without torch.

The network has no frozen weights. Communication of evaluations, saves and the start of a run is not included.
N tokens, b images per micro batch, h hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import lcm

from megavit.planner.flops import DecoderShape, NetworkShape


class Collective(Enum):
    """An operation, by its name in torch.distributed."""

    all_reduce = "all_reduce"
    all_gather = "all_gather"
    reduce_scatter = "reduce_scatter"
    broadcast = "broadcast"
    send = "send"
    recv = "recv"


class Axis(Enum):
    """The ranks that take part in a collective.

    They are those along an axis of the layout, a neighbour in the pipeline, the ranks of one copy of the network
    (`model`), or all.
    """

    tp = "tp"
    dp = "dp"
    next_stage = "next_stage"
    previous_stage = "previous_stage"
    model = "model"
    world = "world"


@dataclass(frozen=True)
class Exchange:
    """Equal calls that a rank makes in a training step.

    Attributes:
        purpose: what the calls are for.
        collective: the operation.
        axis: the ranks that take part.
        ranks: number of ranks that take part, this one included.
        num_bytes: size of one call's full tensor: each rank's input of a reduction, each rank's output of a gather.
        calls: number of calls per step.
    """

    purpose: str
    collective: Collective
    axis: Axis
    ranks: int
    num_bytes: int
    calls: int

    @property
    def sent_bytes(self) -> float:
        """Return the bytes that this rank sends per step with ring algorithms; for a broadcast, the mean over ranks."""
        share = {
            Collective.all_reduce: 2 * (self.ranks - 1) / self.ranks,
            Collective.all_gather: (self.ranks - 1) / self.ranks,
            Collective.reduce_scatter: (self.ranks - 1) / self.ranks,
            Collective.broadcast: (self.ranks - 1) / self.ranks,
            Collective.send: 1.0,
            Collective.recv: 0.0,
        }
        return share[self.collective] * self.num_bytes * self.calls


@dataclass(frozen=True)
class Split:
    """The sizes of the layout, named as in the group `parallel`.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vpp: stages per pipeline rank.
        dp: data-parallel size.
        sequence_parallel: whether the tensor-parallel ranks split the tokens between the matrices.
        recomputes_layers: whether the backward pass recomputes full layers (full recompute).
        recomputed_layers: with full recompute, recomputed encoder layers per stage (the method `block`); None for all.
        recomputes_widened: whether the backward pass recomputes norms, fc1 and GELU (selective recompute).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    recomputes_layers: bool = False
    recomputed_layers: int | None = None
    recomputes_widened: bool = False

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.tp * self.pp * self.dp


@dataclass(frozen=True)
class Work:
    """The work of a data-parallel rank in a step.

    Attributes:
        micro_batch: images per micro batch.
        num_microbatches: micro batches per step.
        value_bytes: bytes per value of tokens and weights: 4 in fp32, 2 in bf16.
        grad_bytes: bytes per weight's gradient as it is accumulated and reduced.
        image_bytes: bytes per image as it is read.
        label_bytes: bytes per label as it is read; 0 if the task needs no labels.
    """

    micro_batch: int
    num_microbatches: int
    value_bytes: int
    grad_bytes: int
    image_bytes: int
    label_bytes: int


@dataclass(frozen=True)
class Share:
    """The part of the network that a pipeline rank holds.

    Attributes:
        pp_rank: the rank's pipeline coordinate.
        stages: encoder layers of all stages, in the order of the layers; stage s is on pipeline rank s mod pp.
        weights: size in values of each weight on one tensor-parallel rank, by stage of this rank.
        summed: values of the weights whose gradients are summed over the tensor-parallel ranks (`summed_values`).
    """

    pp_rank: int
    stages: Sequence[int]
    weights: Sequence[Sequence[int]]
    summed: int


def layer_calls(
    *, sequence_parallel: bool, recomputes_layer: bool = False, recomputes_widened: bool = False
) -> dict[Collective, int]:
    """Count the tensor-parallel collectives of one layer and micro batch, each of N·b·h values.

    The forward pass sums the outputs of the two row-parallel matrices; the backward pass sums the gradients of the
    inputs of the two column-parallel ones. With sequence parallelism a sum is a reduce-scatter, and each matrix gathers
    its input tokens: column-parallel ones again in the backward pass, for which only this rank's tokens were kept.

    Args:
        sequence_parallel: whether tokens are split between the matrices.
        recomputes_layer: whether the backward pass recomputes the layer, and so repeats its forward communication.
        recomputes_widened: whether the backward pass recomputes norm, fc1 and GELU, so that fc1 gathers again.

    Source: arXiv 2205.05198, section 4.2.2; the third gather of a column-parallel matrix's input is Megatron-Core's
    (0.16.1, tensor_parallel/layers.py).
    """
    again = 2 if recomputes_layer else 0
    if not sequence_parallel:
        return {Collective.all_reduce: 4 + again}
    gathers = 6 + again + (1 if recomputes_widened and not recomputes_layer else 0)
    return {Collective.all_gather: gathers, Collective.reduce_scatter: 4 + again}


def summed_values(
    hidden: int,
    num_layers: int,
    *,
    sequence_parallel: bool,
    layer_scale: bool = False,
    qk_norm_dim: int = 0,
    final_norm: bool = False,
) -> int:
    """Count the values of a rank's weights whose gradients are summed over the tensor-parallel ranks.

    With sequence parallelism these are the weights that are applied to a rank's tokens only: norms, the biases after
    row-parallel matrices, layer scales. The norms of queries and keys are applied to a rank's heads in any case.

    Args:
        hidden: token width.
        num_layers: layers on the rank.
        sequence_parallel: whether tokens are split between the matrices.
        layer_scale: whether the residual branches have layer scales.
        qk_norm_dim: width of a head if queries and keys are normalised, else 0.
        final_norm: whether the rank holds the norm after the last layer.
    """
    split = num_layers * (6 + 2 * layer_scale) * hidden + 2 * hidden * final_norm
    return split * sequence_parallel + 4 * qk_norm_dim * num_layers


def padded_values(weights: Sequence[int], *, dp: int) -> int:
    """Return the size in values of Megatron-Core's buffer of a stage's gradients or weights with a sharded optimizer.

    Each weight starts at a multiple of 64 values; the data-parallel ranks have equal parts, and the size is a multiple
    of 128. This is for one bucket: with overlapped reduction there are several buckets, each of them padded.

    Args:
        weights: size in values of each weight, in the model's order.
        dp: data-parallel size.

    Source: Megatron-LM, megatron/core/distributed/param_and_grad_buffer.py (0.16.1).
    """
    end = 0
    for values in reversed(weights):
        end = _round_up(end, 64) + values
    return _round_up(end, lcm(dp, 128))


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def step_exchanges(
    shape: NetworkShape, split: Split, work: Work, share: Share, *, num_sums: int, shards_optimizer: bool = True
) -> list[Exchange]:
    """List the exchanges of one rank in a step whose metrics are logged.

    Args:
        shape: sizes of the network.
        split: the layout.
        work: work of a data-parallel rank.
        share: the part of the network that this rank holds.
        num_sums: metric sums of the task.
        shards_optimizer: whether the optimizer's state is sharded over the data-parallel ranks, as Adam's is.
    """
    exchanges = [
        *data_exchanges(share.weights, split=split, work=work, shards_optimizer=shards_optimizer),
        *agreement_exchanges(split, num_sums=num_sums, shards_optimizer=shards_optimizer),
    ]
    if split.tp > 1:
        exchanges += tensor_exchanges(shape, split=split, work=work, share=share)
    if split.pp > 1:
        exchanges += pipeline_exchanges(shape, split=split, work=work, pp_rank=share.pp_rank)
    return exchanges


def tensor_exchanges(shape: NetworkShape, *, split: Split, work: Work, share: Share) -> list[Exchange]:
    """List the collectives of one pipeline rank's tensor-parallel ranks in a step.

    A decoder's tokens are never split. One rank reads images and labels and broadcasts them.

    Args:
        shape, split, work, share: see `step_exchanges`.
    """
    first, last = share.pp_rank == 0, share.pp_rank == split.pp - 1
    local, decoder, most = share.stages[share.pp_rank :: split.pp], shape.decoder, split.recomputed_layers
    again = sum(count if most is None else min(count, most) for count in local) if split.recomputes_layers else 0

    def calls(purpose: str, collective: Collective, num_bytes: int, count: int) -> Exchange:
        return Exchange(purpose, collective, Axis.tp, split.tp, num_bytes, count)

    def layers(of: NetworkShape | DecoderShape, count: int, *, splits: bool, recomputes: bool) -> list[Exchange]:
        each = layer_calls(
            sequence_parallel=splits, recomputes_layer=recomputes, recomputes_widened=split.recomputes_widened
        )
        size = _tokens_bytes(of, work)
        return [calls("layers", what, size, count * times * work.num_microbatches) for what, times in each.items()]

    exchanges = layers(shape, sum(local) - again, splits=split.sequence_parallel, recomputes=False)
    exchanges += layers(shape, again, splits=split.sequence_parallel, recomputes=True)
    if last and decoder is not None:
        exchanges += layers(decoder, decoder.layers, splits=False, recomputes=split.recomputes_layers)
    if split.sequence_parallel:
        # The embedding's gradient; the tokens for the head or the decoder.
        edges = (first + last) * work.num_microbatches
        exchanges.append(calls("edges", Collective.all_gather, _tokens_bytes(shape, work), edges))
    if share.summed:
        exchanges.append(calls("summed gradients", Collective.all_reduce, share.summed * work.grad_bytes, 1))
    if first or (last and decoder is not None):
        size = work.image_bytes * work.micro_batch
        exchanges.append(calls("images", Collective.broadcast, size, work.num_microbatches))
    if last and work.label_bytes:
        size = work.label_bytes * work.micro_batch
        exchanges.append(calls("labels", Collective.broadcast, size, work.num_microbatches))
    return [exchange for exchange in exchanges if exchange.calls]


def pipeline_exchanges(shape: NetworkShape, *, split: Split, work: Work, pp_rank: int) -> list[Exchange]:
    """List the exchanges of a pipeline rank with its neighbours in a step.

    Each stage boundary is crossed, for each micro batch, by one activation forward and by its gradient backward.
    Without sequence parallelism every tensor-parallel rank sends the full activation to its counterpart.

    Args:
        shape, split, work: see `step_exchanges`.
        pp_rank: the pipeline rank.
    """
    size = _tokens_bytes(shape, work) // (split.tp if split.sequence_parallel else 1)
    local, last = range(pp_rank, split.pp * split.vpp, split.pp), split.pp * split.vpp - 1
    after = sum(stage < last for stage in local) * work.num_microbatches
    before = sum(stage > 0 for stage in local) * work.num_microbatches
    crossing = [
        Exchange("activations", Collective.send, Axis.next_stage, 2, size, after),
        Exchange("activations", Collective.recv, Axis.previous_stage, 2, size, before),
        Exchange("gradients", Collective.send, Axis.previous_stage, 2, size, before),
        Exchange("gradients", Collective.recv, Axis.next_stage, 2, size, after),
    ]
    return [exchange for exchange in crossing if exchange.calls]


def data_exchanges(
    weights: Sequence[Sequence[int]], *, split: Split, work: Work, shards_optimizer: bool = True
) -> list[Exchange]:
    """List the data-parallel collectives of a step, for any number of micro batches.

    The ranks reduce the gradients, and gather the weights if each rank updates only its shard. The list is empty if no
    other rank holds the same weights.

    Args:
        weights: see `Share`.
        split, work, shards_optimizer: see `step_exchanges`.
    """

    def calls(purpose: str, collective: Collective, num_bytes: int) -> Exchange:
        return Exchange(purpose, collective, Axis.dp, split.dp, num_bytes, 1)

    exchanges: list[Exchange] = []
    for stage in weights if split.dp > 1 else ():
        if shards_optimizer:
            values = padded_values(stage, dp=split.dp)
            exchanges.append(calls("gradients", Collective.reduce_scatter, values * work.grad_bytes))
            exchanges.append(calls("weights", Collective.all_gather, values * work.value_bytes))
        else:
            exchanges.append(calls("gradients", Collective.all_reduce, sum(stage) * work.grad_bytes))
    return exchanges


def agreement_exchanges(split: Split, *, num_sums: int, shards_optimizer: bool = True) -> list[Exchange]:
    """List the small all-reduces of a step.

    They are for the norm of the gradients, whether gradients outside the norm are finite, whether to stop, and the
    metric sums of a logged step.

    Args:
        split, num_sums, shards_optimizer: see `step_exchanges`.
    """
    world = split.world_size

    def calls(purpose: str, num_bytes: int, axis: Axis, ranks: int) -> Exchange:
        return Exchange(purpose, Collective.all_reduce, axis, ranks, num_bytes, 1)

    exchanges = [calls("metrics", 8 * num_sums, Axis.world, world)]
    if split.tp > 1:
        exchanges.append(calls("finite", 4, Axis.world, world))
    if shards_optimizer:
        exchanges.append(calls("norm", 4, Axis.world, world))
    else:
        exchanges.append(calls("norm", 4, Axis.model, split.tp * split.pp))
    if world > 1:
        exchanges.append(calls("stop", 8, Axis.world, world))
    return exchanges


def _tokens_bytes(of: NetworkShape | DecoderShape, work: Work) -> int:
    return of.tokens * work.micro_batch * of.hidden * work.value_bytes
