"""Order and idle ticks of the pipeline: the simulation, compared with real runs of Megatron-Core's schedules."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.validate import validate
from megavit.planner.flops import DecoderShape, NetworkShape, training_flops
from megavit.planner.pipeline_timeline import (
    Pass,
    StageCost,
    even_idle_fraction,
    order_turns,
    simulate,
    stage_costs,
)
from megavit.planner.stage_balance import balance_layers
from tests.distributed import run_ranks
from tests.planner.passes import Log, logged, replay
from tests.reference import SMALL
from tests.test_mae_parity import MAE

# (virtual size, micro batches, whether exchanges overlap) by pipeline size; some have fewer micro batches than ranks.
REAL = {
    2: [(1, 1, False), (1, 5, False), (2, 2, False), (2, 6, False), (2, 6, True)],
    4: [(1, 2, False), (1, 6, False), (2, 4, False), (2, 8, False), (2, 8, True)],
}
CASES = [(pp, *case) for pp, cases in REAL.items() for case in cases]
# The decoder costs twice as much as the full encoder.
NETWORK = [*SMALL, *MAE, "model.hidden_size=16", "model.ffn_size=32", "model.num_layers=8", "task.baseline_samples=4"]
EVEN, DECODER, ODD = "even stages", "decoder on the last stage", "odd stages"
ONE_STEP = ["train.steps=1", "optim.warmup_steps=0", "train.micro_batch=1"]


def odd_costs(num_stages: int) -> list[StageCost]:
    return [StageCost(2 + stage % 3, 5 + stage % 2) for stage in range(num_stages)]


def log_steps(runs: list[ExperimentConfig]) -> list[tuple[Log, NetworkShape, list[int]]]:
    """Train a step of each run; return the log of this rank's schedule, the network and its stages."""
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    steps = []
    for config in runs:
        validate(config, world_size_from_environment())
        trainer = Trainer(config, evaluates=False, saves=False)
        log = Log()
        with logged(log, pp=trainer.layout.pp, pp_rank=trainer.layout.pp_rank):
            trainer.run()
        steps.append((log, trainer.resolved.shape, trainer.resolved.stages))
    return steps


@cache
def real_steps(pp: int, run_dir: str) -> dict:
    """Return each rank's log, the network and its stages, by case."""
    config, runs = compose([*NETWORK, *ONE_STEP]), []
    for index, (vpp, num_microbatches, overlaps) in enumerate(REAL[pp]):
        runs.append(
            replace(
                config,
                parallel=replace(config.parallel, pp=pp, vpp=vpp, overlap_p2p=overlaps),
                train=replace(config.train, global_batch=num_microbatches),
                run=replace(config.run, dir=f"{run_dir}/{pp}/{index}"),
            )
        )
    by_rank = run_ranks(log_steps, pp, runs)
    return {
        case: ([steps[index][0] for steps in by_rank], *by_rank[0][index][1:]) for index, case in enumerate(REAL[pp])
    }


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("schedules"))
    return lambda pp, *case: real_steps(pp, folder)[case]


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches", "overlaps"), CASES)
def test_ranks_run_the_passes_in_the_order_that_is_listed(pp, vpp, num_microbatches, overlaps, real):
    logs, _, _ = real(pp, vpp, num_microbatches, overlaps)
    turns = order_turns(num_microbatches, pp=pp, vpp=vpp, overlaps=overlaps)
    assert [log.passes for log in logs] == [[one for turn in order for one in turn] for order in turns]


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches", "overlaps"), CASES)
def test_each_pass_receives_the_output_of_the_pass_it_waits_for(pp, vpp, num_microbatches, overlaps, real):
    logs, _, _ = real(pp, vpp, num_microbatches, overlaps)
    entered = {made: value for log in logs for made, value in log.entered.items()}
    left = {made: value for log in logs for made, value in log.left.items()}
    last = pp * vpp - 1
    assert len(entered) == 2 * (last + 1) * num_microbatches
    for made, value in entered.items():
        before = made.stage + (1 if made.is_backward else -1)
        begins = before in (-1, last + 1)
        assert value == (0 if begins else left[Pass(before, made.microbatch, made.is_backward)]), made
    # Guard against an empty comparison.
    crossing = [value for made, value in entered.items() if value]
    assert len(set(crossing)) == len(crossing) == 2 * last * num_microbatches


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches", "overlaps"), CASES)
@pytest.mark.parametrize("costs_of", [EVEN, DECODER, ODD])
def test_idle_ticks_of_the_real_schedule_are_the_simulations(
    pp, vpp, num_microbatches, overlaps, costs_of, real, figure
):
    logs, shape, stages = real(pp, vpp, num_microbatches, overlaps)
    costs = {
        EVEN: [StageCost(1, 2)] * len(stages),
        DECODER: stage_costs(shape, stages),
        ODD: odd_costs(len(stages)),
    }[costs_of]
    ran = replay(logs, costs)
    said = simulate(order_turns(num_microbatches, pp=pp, vpp=vpp, overlaps=overlaps), costs)
    assert said.spans == ran.spans
    assert said.idle == ran.idle
    closed = even_idle_fraction(num_microbatches, pp=pp, vpp=vpp)
    if costs_of == EVEN:
        assert ran.idle_fraction == closed
        assert len(set(ran.idle)) == 1
    if costs_of == DECODER:
        # With one micro batch all ranks but one are idle at any time, whatever the stages cost.
        assert ran.idle_fraction > closed if num_microbatches > 1 else ran.idle_fraction == closed
        figure(
            f"PP {pp}, VPP {vpp}{' overlapped' if overlaps else ''}, {num_microbatches} micro batches, MAE's stages "
            f"{stages}: idle {ran.idle_fraction:.3f}, of even stages {closed:.3f}"
        )


@pytest.mark.parametrize("overlaps", [False, True], ids=["", "overlapped"])
@pytest.mark.parametrize("vpp", [1, 2, 3])
@pytest.mark.parametrize("pp", [2, 3, 8])
def test_even_stages_idle_by_the_closed_formula(pp, vpp, overlaps):
    counts = [pp, 2 * pp, 5 * pp, *((1, pp + 1, 3 * pp - 1) if vpp == 1 else ())]
    for num_microbatches, cost in product(counts, (StageCost(1, 1), StageCost(3, 5), StageCost(5, 2))):
        turns = order_turns(num_microbatches, pp=pp, vpp=vpp, overlaps=overlaps)
        timeline = simulate(turns, [cost] * pp * vpp)
        assert timeline.idle == [(pp - 1) * (cost.forward + cost.backward)] * pp
        assert timeline.idle_fraction == even_idle_fraction(num_microbatches, pp=pp, vpp=vpp)


def test_uneven_stages_wait_longer_where_exchanges_do_not_overlap():
    alone, overlapped = (
        simulate(order_turns(12, pp=4, vpp=2, overlaps=overlaps), odd_costs(8)).length for overlaps in (False, True)
    )
    assert alone > overlapped


def test_ranks_that_deadlock_are_named():
    circle = [[(Pass(0, 0, True),), (Pass(0, 0, False),)], [(Pass(1, 0, False),), (Pass(1, 0, True),)]]
    with pytest.raises(ValueError, match=r"0: \(Pass\(stage=0, microbatch=0, is_backward=True\)"):
        simulate(circle, [StageCost(1, 2)] * 2)


MAE_B = NetworkShape(
    768, 3072, 12, tokens=50, patches=49, patch_values=768, classes=0, decoder=DecoderShape(512, 2048, 8, tokens=197)
)
VIT_B = NetworkShape(768, 3072, 12, tokens=197, patches=196, patch_values=768, classes=1000)


@pytest.mark.parametrize("shape", [VIT_B, MAE_B], ids=["ViT-B", "MAE-B"])
def test_the_stages_costs_are_together_the_training_flops(shape):
    for stages in ([12], [8, 4], [6, 4, 2, 0]):
        costs = stage_costs(shape, stages)
        assert sum(cost.forward + cost.backward for cost in costs) == training_flops(shape)
        again = sum(cost.backward for cost in stage_costs(shape, stages, recomputes=True))
        in_decoder = 8 * 2 * 197 * (4 * 512**2 + 2 * 512 * 2048) + 8 * 4 * 197**2 * 512 if shape.decoder else 0
        in_encoder = 12 * (2 * shape.tokens * 12 * 768**2 + 4 * shape.tokens**2 * 768)
        assert again - sum(cost.backward for cost in costs) == in_encoder + in_decoder


def test_balanced_stages_idle_least():
    def idle(stages: list[int]) -> float:
        return simulate(order_turns(16, pp=2), stage_costs(VIT_B, stages)).idle_fraction

    best = balance_layers(12, 2)
    assert all(idle(best) <= idle([layers, 12 - layers]) for layers in range(1, 12))
