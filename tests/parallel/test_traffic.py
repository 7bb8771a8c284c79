"""Compare each call and each byte that a real run sends with the arithmetic of `megavit.planner.communication`."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_num_microbatches
from megavit.config.train import GradReduce, Precision
from megavit.config.validate import validate
from megavit.optim.registry import is_sharded
from megavit.parallel.config import Recompute, RecomputeMethod
from megavit.planner.communication import Axis, Share, Split, Work, step_exchanges, summed_values
from megavit.planner.flops import NetworkShape
from tests.distributed import run_ranks
from tests.reference import SMALL, plain_model
from tests.test_mae_parity import MAE
from tests.test_mae_parity import SP as MAE_SP
from tests.train.test_engine import GRID, OVERLAP, VPP
from tests.train.test_parity import SP

STEPS = 2
TWO_STEPS = [f"train.steps={STEPS}", "optim.warmup_steps=1"]
FULL, SELECTIVE = ["parallel.recompute=full"], ["parallel.recompute=selective"]
ONE_OF_A_STAGE = [*FULL, "parallel.recompute_method=block", "parallel.recompute_layers=1"]
GROUPS_OF_TWO = [*FULL, "parallel.recompute_layers=2"]
TP, PP = ["parallel.tp=2"], ["parallel.pp=2"]
BF16 = ["train.precision=bf16_o2"]
EVERYTHING = ["model.layer_scale=0.1", "model.qk_norm=true", "model.pool=mean"]

RUNS = {
    "TP 2": (2, TP),
    "TP 2, full recompute": (2, [*TP, *FULL]),
    "TP 2, full recompute of one layer": (2, [*TP, *ONE_OF_A_STAGE]),
    "TP 2 + SP": (2, SP),
    "TP 2 + SP, full recompute": (2, [*SP, *FULL]),
    "TP 2 + SP, selective recompute": (2, [*SP, *SELECTIVE]),
    "TP 2 + SP, layer scale, qk-norm, mean": (2, [*SP, *EVERYTHING]),
    "DP 2": (2, []),
    "DP 2, bf16": (2, BF16),
    "DP 2, overlapped": (2, OVERLAP),
    "PP 2": (2, PP),
    "VPP 2, overlapped p2p": (2, [*VPP, "parallel.overlap_p2p=true"]),
    "MAE, TP 2 + SP, full recompute": (2, [*MAE, *MAE_SP, *GROUPS_OF_TWO]),
    "DP 2 × TP 2, SGD": (4, [*TP, "optim=sgd", "optim.lr=0.05"]),
    "PP 4, VPP 2": (4, ["parallel.pp=4", "parallel.vpp=2", "model.num_layers=8"]),
    "TP 2 + SP, PP 2, bf16, full recompute": (4, [*SP, *PP, *BF16, *FULL]),
    "MAE, TP 2 × PP 2, qk-norm": (4, [*MAE, *GRID, "parallel.stages=[2,2]", "model.qk_norm=true"]),
    "MAE, TP 2 + SP, PP 2": (4, [*MAE, *MAE_SP, *PP, "parallel.stages=[3,1]"]),
    "one rank": (1, []),
}
# At least one call of each kind, single and coalesced, waited for at once and later.
PROFILED = ("DP 2, overlapped", "TP 2 + SP, PP 2, bf16, full recompute")
MICRO_BATCH, HIDDEN, LAYERS, FP32 = 4, 32, 4, 4
# Tokens of 8 × 8 pixels in patches of 2, with one class token, and with eight for sequence parallelism.
TOKENS, TOKENS_SP = 17, 24


@dataclass
class Seen:
    """The calls of one rank in a run's training loop, and its coordinates.

    Attributes:
        calls: count of each call.
        by_gloo: gloo's own count, if it was recorded; `expected_by_gloo` is the count that the calls imply.
        ranks: global ranks along each axis.
        share: the part of the network that the rank holds.
        shape: the network.
    """

    calls: Counter
    by_gloo: Counter
    expected_by_gloo: Counter
    ranks: dict[Axis, tuple[int, ...]]
    share: Share
    shape: NetworkShape


def record_runs(runs: list[tuple[ExperimentConfig, bool]]) -> list[Seen]:
    """Train each run on this rank; with True record gloo's count too."""
    return [record_run(config, profiles=profiles) for config, profiles in runs]


def record_run(config: ExperimentConfig, *, profiles: bool) -> Seen:
    import torch.distributed as dist

    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer
    from tests.parallel.traffic import as_gloo_counts, counted_by_gloo, recorded

    validate(config, world_size_from_environment())
    trainer = Trainer(config, evaluates=False, saves=False)
    loop, calls, by_gloo = trainer._train, [], Counter()

    def train(*arguments) -> None:
        # Exclude the calls before and after the training loop.
        with counted_by_gloo() if profiles else nullcontext(Counter()) as counter, recorded() as own:
            loop(*arguments)
        calls.extend(own)
        by_gloo.update(counter)

    trainer._train = train
    trainer.run()
    layout = trainer.layout

    def global_ranks(group) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(group))

    stages = global_ranks(layout.groups.pp)
    ranks = {
        Axis.tp: global_ranks(layout.groups.tp),
        Axis.dp: global_ranks(layout.groups.dp),
        Axis.next_stage: (stages[(layout.pp_rank + 1) % layout.pp],),
        Axis.previous_stage: (stages[layout.pp_rank - 1],),
        Axis.model: global_ranks(layout.groups.mp),
        Axis.world: tuple(range(layout.world_size)),
    }
    weights = [[weight.numel() for weight in chunk.parameters()] for chunk in trainer.chunks.values()]
    share = Share(
        layout.pp_rank, trainer.resolved.stages, weights, summed=_summed(config, layout, trainer.resolved.stages)
    )
    expected = Counter(map(as_gloo_counts, calls))
    return Seen(Counter(calls), by_gloo, expected, ranks, share, trainer.resolved.shape)


def _summed(config: ExperimentConfig, layout, stages: list[int]) -> int:
    model, mae = config.model, config.task.name == "mae"
    count = summed_values(
        model.hidden_size,
        sum(stages[layout.pp_rank :: layout.pp]),
        sequence_parallel=layout.sequence_parallel,
        layer_scale=model.layer_scale is not None,
        qk_norm_dim=model.hidden_size // model.num_heads if model.qk_norm else 0,
        final_norm=layout.holds_last_stage and (mae or model.pool.value == "cls"),
    )
    if mae and layout.holds_last_stage:
        decoder = config.task.decoder(model)
        dim = decoder.hidden_size // decoder.num_heads if model.qk_norm else 0
        count += summed_values(decoder.hidden_size, decoder.num_layers, sequence_parallel=False, qk_norm_dim=dim)
    return count


@cache
def settings(name: str) -> ExperimentConfig:
    return compose([*SMALL, *TWO_STEPS, *RUNS[name][1]])


@cache
def real_runs(world: int, run_dir: str) -> dict[str, list[Seen]]:
    """Return the calls of every rank in each run with this number of ranks."""
    names = [name for name, (ranks, _) in RUNS.items() if ranks == world]
    runs = []
    for index, name in enumerate(names):
        config = settings(name)
        config = replace(config, run=replace(config.run, dir=f"{run_dir}/{index}"))
        runs.append((config, name in PROFILED))
    by_rank = run_ranks(record_runs, world, runs)
    return {name: [seen[index] for seen in by_rank] for index, name in enumerate(names)}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traffic")
    return lambda name: real_runs(RUNS[name][0], str(folder / str(RUNS[name][0])))[name]


def expected_calls(name: str, seen: Seen) -> Counter:
    """Return the calls that the arithmetic expects of the run, by collective, ranks and bytes."""
    config, world = settings(name), RUNS[name][0]
    parallel, bf16 = config.parallel, config.train.precision is Precision.bf16_o2
    split = Split(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        dp=parallel.data_parallel_size(world),
        sequence_parallel=parallel.sequence_parallel,
        recomputes_layers=parallel.recompute is Recompute.full,
        recomputed_layers=parallel.recompute_layers if parallel.recompute_method is RecomputeMethod.block else None,
        recomputes_widened=parallel.recompute is Recompute.selective,
    )
    work = Work(
        micro_batch=MICRO_BATCH,
        num_microbatches=resolve_num_microbatches(config, world),
        value_bytes=2 if bf16 else 4,
        grad_bytes=2 if config.train.grad_reduce is GradReduce.bf16 else 4,
        image_bytes=8 * 8,
        label_bytes=0 if config.task.name == "mae" else 8,
    )
    sharded = is_sharded(config.optim.name)
    calls: Counter = Counter()
    for exchange in step_exchanges(seen.shape, split, work, seen.share, num_sums=3, shards_optimizer=sharded):
        ranks = seen.ranks[exchange.axis]
        assert exchange.ranks == len(ranks) + (exchange.axis in (Axis.next_stage, Axis.previous_stage))
        calls[exchange.collective.value, ranks, exchange.num_bytes] += STEPS * exchange.calls
        # Weights are gathered during the next step and at the run's end; the first step gathers unchanged weights.
        if parallel.overlap_param_gather and exchange.purpose == "weights":
            calls[exchange.collective.value, ranks, exchange.num_bytes] += 1
    return calls


def real_calls(seen: Seen) -> Counter:
    calls: Counter = Counter()
    for call, count in seen.calls.items():
        calls[call.collective, call.ranks, call.num_bytes] += count
    return calls


@pytest.mark.parametrize("name", RUNS)
def test_every_call_of_a_run_is_expected_and_every_expected_call_is_made(name, real):
    for seen in real(name):
        assert real_calls(seen) == expected_calls(name, seen)


def of_tokens(seen: Seen, tokens: int, hidden: int = HIDDEN) -> dict[str, float]:
    """Return the tensor-parallel calls with this number of tokens in fp32, per micro batch."""
    size, microbatches = tokens * MICRO_BATCH * hidden * FP32, 16 // MICRO_BATCH * STEPS
    return {
        call.collective: count / microbatches
        for call, count in seen.calls.items()
        if call.ranks == seen.ranks[Axis.tp] and call.num_bytes == size and call.dtype == torch.float32
    }


@pytest.mark.parametrize(
    ("name", "tokens", "per_layer"),
    [
        ("TP 2", TOKENS, {"all_reduce": 4}),
        ("TP 2, full recompute", TOKENS, {"all_reduce": 6}),
        ("TP 2 + SP", TOKENS_SP, {"all_gather": 6, "reduce_scatter": 4}),
        ("TP 2 + SP, full recompute", TOKENS_SP, {"all_gather": 8, "reduce_scatter": 6}),
        ("TP 2 + SP, selective recompute", TOKENS_SP, {"all_gather": 7, "reduce_scatter": 4}),
    ],
)
def test_tensor_parallel_ranks_exchange_the_tokens_that_often_for_each_layer_and_micro_batch(
    name, tokens, per_layer, real, figure
):
    for seen in real(name):
        calls = of_tokens(seen, tokens)
        # Calls outside the layers: the embedding's gradient and the head's tokens.
        edges = 2 if "SP" in name else 0
        assert calls == {what: LAYERS * count + edges * (what == "all_gather") for what, count in per_layer.items()}
    figure(f"{name}: per layer and micro batch {per_layer}, {edges} gathers besides, each of tokens · batch · hidden")


def test_a_decoders_layers_are_sent_on_the_last_stage_and_never_split(real):
    decoder_layers, narrow = 2, 24
    for rank, seen in enumerate(real("MAE, TP 2 × PP 2, qk-norm")):
        # The encoder reads 4 of 16 patches and the class token, the decoder all. Each stage has two encoder layers.
        assert of_tokens(seen, 5) == {"all_reduce": 2 * 4}
        assert of_tokens(seen, 17, narrow) == ({"all_reduce": 4 * decoder_layers} if rank >= 2 else {})
    for rank, seen in enumerate(real("MAE, TP 2 + SP, PP 2")):
        layers = 3 if rank < 2 else 1
        assert of_tokens(seen, 12) == {"all_gather": 6 * layers + 1, "reduce_scatter": 4 * layers}
        assert of_tokens(seen, 24, narrow) == ({"all_reduce": 4 * decoder_layers} if rank >= 2 else {})
    for seen in real("MAE, TP 2 + SP, full recompute"):
        assert of_tokens(seen, 24, narrow) == {"all_reduce": 6 * decoder_layers}


@pytest.mark.parametrize(("name", "weight_bytes"), [("DP 2", 4), ("DP 2, bf16", 2), ("DP 2, overlapped", 4)])
def test_data_parallel_ranks_reduce_fp32_gradients_and_gather_weights_once_a_step(name, weight_bytes, real, figure):
    weights = [weight.numel() for weight in plain_model(settings(name)).parameters()]
    for seen in real(name):
        large = Counter({call: count for call, count in seen.calls.items() if call.num_bytes > 1000})
        gradients, gathered = sorted(large, key=lambda call: call.collective, reverse=True)
        assert (gradients.collective, gradients.dtype, large[gradients]) == ("reduce_scatter", torch.float32, STEPS)
        # With overlapped gathers, the run's first pass gathers weights that all ranks have.
        assert (gathered.collective, large[gathered] - (name == "DP 2, overlapped")) == ("all_gather", STEPS)
        values = gradients.num_bytes / 4
        assert gathered.num_bytes == values * weight_bytes
        # Each weight begins at a multiple of 64 values, and the buffer ends at a multiple of 128.
        assert sum(weights) <= values < sum(weights) + 64 * len(weights) + 128
    figure(
        f"{name}: per step {gradients.num_bytes:,} bytes of gradients reduced and scattered, {gathered.num_bytes:,} of "
        f"weights gathered; {sum(weights):,} values and {values - sum(weights):,.0f} of padding"
    )


@pytest.mark.parametrize(
    ("name", "num_stages", "num_bytes"),
    [
        ("PP 2", 2, TOKENS * MICRO_BATCH * HIDDEN * FP32),
        ("VPP 2, overlapped p2p", 4, TOKENS * MICRO_BATCH * HIDDEN * FP32),
        ("PP 4, VPP 2", 8, TOKENS * MICRO_BATCH * HIDDEN * FP32),
        # In bf16, each rank sends its own tokens.
        ("TP 2 + SP, PP 2, bf16, full recompute", 2, TOKENS_SP // 2 * MICRO_BATCH * HIDDEN * 2),
        ("MAE, TP 2 × PP 2, qk-norm", 2, 5 * MICRO_BATCH * HIDDEN * FP32),
    ],
)
def test_stages_send_one_activation_forwards_and_one_gradient_backwards_for_each_micro_batch(
    name, num_stages, num_bytes, real
):
    parallel, num_microbatches = settings(name).parallel, 16 // MICRO_BATCH
    want: Counter = Counter()
    for stage, copy in product(range(num_stages - 1), range(parallel.tp)):
        sender, receiver = (index % parallel.pp * parallel.tp + copy for index in (stage, stage + 1))
        want[sender, receiver] += num_microbatches * STEPS
        want[receiver, sender] += num_microbatches * STEPS
    sent, received = Counter(), Counter()
    for rank, seen in enumerate(real(name)):
        for call, count in seen.calls.items():
            if call.collective in ("send", "recv"):
                assert call.num_bytes == num_bytes
                (other,) = call.ranks
                if call.collective == "send":
                    sent[rank, other] += count
                else:
                    received[other, rank] += count
    assert sent == received == want


@pytest.mark.parametrize("name", PROFILED)
def test_gloo_counts_the_same_calls(name, real):
    for seen in real(name):
        assert seen.by_gloo == seen.expected_by_gloo
        assert seen.by_gloo.total() == seen.calls.total() > 0


def call_in_every_way() -> tuple[Counter, Counter]:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    from tests.parallel.traffic import as_gloo_counts, counted_by_gloo, recorded

    bound = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    dist.init_process_group("gloo")
    one, two, other = torch.ones(3), torch.ones(6), 1 - dist.get_rank()
    with counted_by_gloo() as counter, recorded() as calls:
        dist.all_reduce(one, async_op=True).wait()
        bound[0](two, one)
        bound[1](one, two)
        for function, large in ((dist.all_gather_into_tensor, True), (dist.reduce_scatter_tensor, False)):
            with _coalescing_manager(async_ops=True) as coalesced:
                function(*((two, one) if large else (one, two)), async_op=True)
            coalesced.wait()
        swaps = [dist.P2POp(dist.isend, one, other), dist.P2POp(dist.irecv, torch.empty(3), other)]
        for work in dist.batch_isend_irecv(swaps):
            work.wait()
        dist.broadcast(one, src=0)
        dist.all_gather_object([None, None], "an object")
    return Counter(map(as_gloo_counts, calls)), counter


def test_a_call_is_recorded_whichever_way_it_is_made():
    for recorded_calls, by_gloo in run_ranks(call_in_every_way, 2):
        assert recorded_calls == by_gloo
        assert by_gloo.total() == 10
