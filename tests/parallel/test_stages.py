import itertools

import pytest

from megavit.errors import ConfigError
from megavit.parallel.config import ParallelConfig
from megavit.parallel.stages import megatron_layout, plan_stages
from megavit.planner.flops import NetworkShape
from megavit.planner.stage_balance import balance_layers

SHAPE = NetworkShape(hidden=64, ffn=256, layers=8, tokens=17, patches=16, patch_values=4, classes=10)


def slowest(counts, first, last):
    return max(
        count + (first if i == 0 else 0) + (last if i == len(counts) - 1 else 0) for i, count in enumerate(counts)
    )


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0.3, 0.1), (0, 5.5), (1.5, 2.5)])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_balanced_stages_are_as_fast_as_the_best_of_all_placements(stages, first, last):
    layers = 8
    every = [c for c in itertools.product(range(1, layers + 1), repeat=stages - 1) if sum(c) <= layers]
    best = min(slowest([*c, layers - sum(c)], first, last) for c in every)
    counts = balance_layers(layers, stages, first_cost=first, last_cost=last)
    assert sum(counts) == layers
    assert slowest(counts, first, last) == pytest.approx(best)


def test_stages_are_equal_without_other_costs():
    assert balance_layers(12, 4) == [3, 3, 3, 3]


def test_layout_is_spelled_for_megatron():
    assert megatron_layout([3, 5]) == "Ettt|tttttL"
    assert megatron_layout([4, 0]) == "Etttt|L"


@pytest.mark.parametrize(
    ("pp", "stages", "message"),
    [
        (2, [3, 4], r"3 \+ 4 = 7 layers and model.num_layers=8"),
        (2, [8], "names 1 stages and parallel.pp=2 are needed"),
        (3, [8, 0, 0], "every stage but the last needs at least 1 layer"),
        (9, None, "model.num_layers=8 cannot fill parallel.pp=9"),
    ],
)
def test_layers_that_do_not_fit_are_refused_with_the_arithmetic(pp, stages, message):
    with pytest.raises(ConfigError, match=message):
        plan_stages(ParallelConfig(pp=pp, stages=stages), SHAPE)
