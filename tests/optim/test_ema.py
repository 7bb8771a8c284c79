"""The moving average of the weights: equal to plain torch's in any layout and after a resume, and evaluated."""

import pytest

from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.errors import ConfigError
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.train.test_parity import reference

# With SGD: under Adam, weights without a true gradient move by rounding alone.
EMA = [*SMALL, "optim=sgd", "optim.lr=0.05", "optim.ema=0.8"]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, [], id="DP 2"),
        pytest.param(4, ["parallel.tp=2", "parallel.pp=2"], id="TP 2 × PP 2", marks=pytest.mark.slow),
    ],
)
def test_average_equals_plain_torchs(world, layout, tmp_path, figure):
    got = run_ranks(ranks.train, world, [*EMA, *layout, f"run.dir={tmp_path}"])[0]
    want = reference(tuple(EMA))
    worst = max(float((got["averages"][name] - average).abs().max()) for name, average in want.averages.items())
    figure(f"moving average, {world} ranks: largest difference {worst:.1e} after 10 steps")
    assert worst <= 1e-6
    # The average differs from the weights.
    assert max(float((got["weights"][name] - average).abs().max()) for name, average in want.averages.items()) > 1e-3


@pytest.mark.slow
def test_average_continues_in_another_layout_and_is_evaluated_as_the_weights_are(tmp_path):
    adam = [*SMALL, "optim.ema=0.95", "train.steps=8"]
    want = run_ranks(ranks.train_and_evaluate, 1, [*adam, f"run.dir={tmp_path}/whole"])[0]["validation"][-1]
    parts = [*adam, f"run.dir={tmp_path}/parts"]
    run_ranks(ranks.train_and_keep, 2, [*parts, "parallel.pp=2", "train.stop_at=4"])
    got = run_ranks(ranks.train_and_evaluate, 2, [*parts, "parallel.tp=2"])[0]["validation"][-1]
    for name in ("loss", "ema_loss"):
        assert got[name] == pytest.approx(want[name], abs=1e-5)
    assert abs(want["ema_loss"] - want["loss"]) > 1e-3


def test_an_average_that_was_not_saved_is_refused_and_so_is_one_of_weights_under_way(tmp_path):
    run_ranks(ranks.train_and_keep, 1, [*SMALL, "train.steps=4", "train.stop_at=2", f"run.dir={tmp_path}"])
    from megavit.checkpoint.manager import CheckpointManager
    from megavit.train.resume import find_resume_point

    with pytest.raises(ConfigError, match="holds no average of the weights"):
        find_resume_point(
            CheckpointManager(tmp_path / "checkpoints"), compose([*SMALL, "train.steps=4", "optim.ema=0.9"])
        )
    overlapped = [*SMALL, "optim.ema=0.9", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    with pytest.raises(ConfigError, match=r"optim\.ema=0\.9 averages the weights after each step"):
        validate(compose(overlapped), 2)
