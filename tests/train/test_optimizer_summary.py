"""What a run says of its optimizer is so."""

import pytest

from megavit.config.compose import compose
from megavit.optim.config import OptimConfig
from megavit.optim.optimizer import state_bytes
from megavit.train.summary import describe_optimizer, warn_of_average, warn_of_optimizer
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL


@pytest.mark.parametrize(
    "rule", [["optim=adamw"], ["optim=sgd"], ["optim=sgd", "optim.momentum=0"], ["optim=lars"]], ids=" ".join
)
def test_the_logged_bytes_are_those_of_the_optimizers_state(rule, tmp_path):
    keys = [*SMALL, *rule, "train.steps=2", "optim.warmup_steps=1", f"run.dir={tmp_path}"]
    found = run_ranks(ranks.train_and_keep, 1, keys)[0]
    weights = sum(weight.numel() for weight in found["weights"].values())
    held = sum(state.numel() * state.element_size() for of_param in found["optimizer"] for state in of_param.values())
    assert held == state_bytes(compose(keys).optim) * weights


def test_the_note_counts_what_is_trained_and_who_holds_what():
    output = describe_optimizer(
        compose(["recipe=null", "train.steps=1"]).optim, num_trained=90, num_weights=1000, bf16=True, dp=4
    )
    assert output == (
        "optimizer adamw: 8 bytes of state for each weight + 4 of its fp32 copy, shared by 4 data-parallel ranks; "
        "trains 90 of the 1,000 weights"
    )
    lars = compose(["recipe=null", "train.steps=1", "optim=lars"]).optim
    assert describe_optimizer(lars, num_trained=7, num_weights=7, bf16=False, dp=2) == (
        "optimizer lars: 4 bytes of state for each weight, on every data-parallel rank; trains all 7 weights"
    )


def test_plain_sgd_from_scratch_is_warned_of_and_fine_tuning_is_not():
    sgd, adamw = (compose(["recipe=null", "train.steps=1", f"optim={name}"]).optim for name in ("sgd", "adamw"))
    assert "far worse from scratch" in warn_of_optimizer(sgd, from_scratch=True)
    assert warn_of_optimizer(sgd, from_scratch=False) is None
    assert warn_of_optimizer(adamw, from_scratch=True) is None


def test_a_moving_average_that_is_too_slow_for_the_run_is_warned_of_with_one_that_fits():
    def warning(ema: float | None, steps: int) -> str | None:
        return warn_of_average(OptimConfig(ema=ema), num_steps=steps)

    said = warning(0.9999, 300)
    assert said.startswith("warning: optim.ema=0.9999 averages over about 10,000 steps and the run has 300:")
    assert said.endswith("set optim.ema=0.98")
    assert warning(None, 300) is None
    assert warning(0.9999, 30_001) is None
    for steps in (6, 7, 20, 99, 333, 1_437, 29_999):
        assert warning(float(warning(0.9999, steps).rpartition("=")[2]), steps) is None
    assert warning(0.9, 4).endswith("set optim.ema=null")


def test_a_run_says_it_at_its_start_with_its_warnings(tmp_path):
    rule = ["optim=sgd", "task=linear_probe", "optim.ema=0.9999"]
    keys = [*SMALL, *rule, "train.steps=1", "optim.warmup_steps=0", f"run.dir={tmp_path}"]
    weights = run_ranks(ranks.train_and_keep, 1, keys)[0]["weights"]
    # The running mean and variance of the 32 features are no weights.
    count = sum(weight.numel() for weight in weights.values()) - 64
    said = (tmp_path / "train.log").read_text()
    assert f"optimizer sgd: 4 bytes of state for each weight; trains 330 of the {count:,} weights" in said
    assert "far worse from scratch" in said
    assert "warning: optim.ema=0.9999 averages over about 10,000 steps and the run has 1:" in said
    assert "the encoder is frozen with random initial weights; set init_from=RUN" in said
