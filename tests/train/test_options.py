"""Compare the losses of 200 steps with and without each option that changes how a step is computed, not what.

A table of one line per option: the settings with it and those without, and how far the two curves may lie apart on each
set of data, with the measured worst case next to it.
"""

import math
import os
import tempfile
from dataclasses import dataclass, field
from functools import cache

import pytest

from tests import ranks
from tests.distributed import run_ranks
from tests.train.test_engine import BF16, OVERLAP, VPP

STEPS = 200
QUICK_STEPS = 20
DATA = os.environ.get("MEGAVIT_TEST_DATA")

COMMON = [
    f"train.steps={STEPS}",
    "train.global_batch=64",
    "train.micro_batch=32",
    "train.eval_every=null",
    "optim.warmup_steps=20",
    # Which images are dropped depends on the layout.
    "model.drop_path=0",
    "metrics.log_every=1",
    "metrics.tensorboard=false",
    "run.preflight=false",
    "checkpoint.best=false",
]
WORK = {
    "digits": ["recipe=digits"],
    "CIFAR-10": [
        "recipe=cifar10", f"data.path={DATA}", "train.epochs=null", "checkpoint.save_every=null", "model.patch_size=8",
        "model.hidden_size=64", "model.ffn_size=128", "model.num_heads=4", "model.num_layers=4",
    ],
    "MAE": ["recipe=digits_mae", "metrics.pictures_every=null", "task.baseline_samples=64"],
}  # fmt: skip
# At the digits recipes' own rate of 2e-3 rounding alone grows to 7.5e-4 of a classifier's loss within 200 steps, and to
# 1.3e-5 at this one. An autoencoder leaves the mean image within them, which makes much of little: 3.5e-2 at 1e-3.
RATE = {"digits": 1e-3, "CIFAR-10": 1e-3, "MAE": 3e-4}


@dataclass(frozen=True)
class Option:
    """An option, on and off.

    Attributes:
        on: settings with it.
        digits: how far apart the curves may lie there, as a share of the loss.
        cifar10: the same there.
        mae: the same of a masked autoencoder on the digits; None where it is not run.
        ranks: that it takes.
        off: settings without it.
        off_ranks: that those take.
        window: successive steps whose mean is compared. In bf16 single steps scatter by a few hundredths of the loss
            wherever anything is rounded otherwise, means of 20 by a few thousandths; in FP8 means of 100 by one or two
            hundredths.
    """

    on: list[str]
    digits: float
    cifar10: float
    mae: float | None = None
    ranks: int = 1
    off: list[str] = field(default_factory=list)
    off_ranks: int = 1
    window: int = 1

    def bound(self, work: str) -> float | None:
        return {"digits": self.digits, "CIFAR-10": self.cifar10, "MAE": self.mae}[work]


TP, EIGHT_TOKENS, BF16_REDUCE = ["parallel.tp=2"], ["model.class_tokens=8"], ["train.grad_reduce=bf16"]
SP = [*TP, "parallel.sequence_parallel=true", *EIGHT_TOKENS]

# Measured, in the order of the bounds: digits, CIFAR-10, MAE.
OPTIONS = {
    # 8.2e-6, 2.3e-7, 3.5e-5
    "TP 2": Option(TP, 1e-4, 2e-6, 2e-3, ranks=2),
    # 1.3e-5, 2.2e-7
    "TP 2 + SP": Option(SP, 1e-4, 2e-6, ranks=2, off=EIGHT_TOKENS),
    # 1.8e-6, 2.3e-7; of an autoencoder 3.6e-4
    "PP 2": Option(["parallel.pp=2"], 1e-4, 2e-6, ranks=2),
    # 5.4e-6, 2.4e-7, 5.7e-5
    "VPP 2, overlapped p2p": Option([*VPP, "parallel.overlap_p2p=true"], 1e-4, 2e-6, 2e-3, ranks=2),
    # 1.6e-6, 1.9e-7
    "DP 2": Option([], 1e-4, 2e-6, ranks=2),
    # The same bits.
    "DP 2, reduce and gather overlapped": Option(OVERLAP, 0, 0, ranks=2, off_ranks=2),
    "selective recompute": Option(["parallel.recompute=selective"], 0, 0, 0),
    "full recompute": Option(["parallel.recompute=full"], 0, 0),
    # 2.1e-6, 2.3e-7, 1.2e-4
    "products into the gradients": Option(["train.gradient_accumulation_fusion=true"], 1e-4, 2e-6, 2e-3),
    # 1.4e-6, 2.4e-7, 3.0e-4
    "compiled layers": Option(["train.compile=layer"], 1e-4, 2e-6, 2e-3),
    # 2.2e-6, 2.3e-7, 2.5e-4
    "oneDNN's products": Option(["model.linear_backend=onednn"], 1e-4, 2e-6, 2e-3),
    # 7.0e-3, 9.2e-4; with seeds 1 and 2 on digits 1.2e-2, 5.1e-3. Not held for an autoencoder, whose first steps lag.
    "BF16 O2": Option(BF16, 1.5e-2, 2e-3, window=20),
    # 1.5e-2, 1.5e-3; with seeds 1 to 4 on digits 1.4e-2, 4.4e-3, 3.4e-3, 2.1e-2, with 1 and 2 on CIFAR-10 1.6e-3,
    # 1.3e-3. Neither way: the last 50 steps lie -1.2e-2, -2e-4, 4e-3, 8e-3, -2.0e-2 and -8e-4, 1.3e-3, -1.1e-3 apart.
    # By the same measure BF16 O2 is 3.4e-3 to 4.9e-3 and 1.8e-4 to 5.9e-4 from fp32. Not held for an autoencoder:
    # 2.0e-2, and 8.7e-3 above bf16's loss at the end.
    "FP8": Option([*BF16, "model.linear_backend=fp8"], 3e-2, 4e-3, off=BF16, window=100),
    # 5.3e-3, 2.0e-4
    "gradients reduced in bf16": Option([*BF16, *BF16_REDUCE], 1.5e-2, 2e-3, ranks=2, off=BF16, off_ranks=2, window=20),
}

needs_data = pytest.mark.skipif(DATA is None, reason="MEGAVIT_TEST_DATA names no folder with CIFAR-10")
EVERY_CURVE = [
    pytest.param(work, name, marks=[pytest.mark.slow, *([needs_data] if work == "CIFAR-10" else [])])
    for work in WORK
    for name, option in OPTIONS.items()
    if option.bound(work) is not None
]


@pytest.mark.parametrize(("work", "name"), EVERY_CURVE)
def test_the_loss_is_the_same_with_and_without(work, name, figure):
    option = OPTIONS[name]
    on, off = train(work, option.ranks, option.on), train(work, option.off_ranks, option.off)
    # What learns nothing would agree, too.
    assert sum(off[-20:]) < 0.85 * sum(off[:20])
    worst = apart(on, off, window=option.window)
    figure(f"{name}, {work}: losses of {STEPS} steps with and without within {worst:.1e}, bound {option.bound(work)}")
    assert worst <= option.bound(work)


@pytest.mark.parametrize(
    "name",
    [pytest.param("VPP 2, overlapped p2p", marks=pytest.mark.slow), "DP 2, reduce and gather overlapped"],
)
def test_the_first_steps_are_the_same_with_and_without(name, figure):
    option = OPTIONS[name]
    on = train("digits", option.ranks, option.on, steps=QUICK_STEPS)
    off = train("digits", option.off_ranks, option.off, steps=QUICK_STEPS)
    worst = apart(on, off)
    figure(f"{name}, digits: losses of {QUICK_STEPS} steps with and without within {worst:.1e}")
    # Measured: 1.1e-7 and 0.
    assert worst <= min(1e-6, option.digits)


def test_the_first_steps_at_a_rate_one_percent_higher_are_not():
    higher = train("digits", 1, [f"optim.lr={1.01 * RATE['digits']}"], steps=QUICK_STEPS)
    # Measured: 3.7e-4.
    assert apart(higher, train("digits", 1, [], steps=QUICK_STEPS)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("work", ["digits", pytest.param("CIFAR-10", marks=needs_data), "MAE"])
def test_another_training_is_outside_the_bounds(work, figure):
    # A difference of 1 % is detected in fp32, of 10 % in bf16, and of 25 % in FP8.
    for share, window in ((1.01, 1), (1.1, 20), (1.25, 100)):
        bounds = [option.bound(work) or 0 for option in OPTIONS.values() if option.window == window]
        if not any(bounds):
            continue
        worst = apart(train(work, 1, [f"optim.lr={share * RATE[work]}"]), train(work, 1, []), window=window)
        figure(
            f"{work}: losses with the rate times {share}, means of {window}, within {worst:.1e}, bounds {set(bounds)}"
        )
        # Measured: 2.9e-2, 1.8e-3, 1.0e-2 of a hundredth more; 2.9e-2, 5.6e-3 of a tenth; 4.9e-2, 7.2e-3 of a quarter.
        assert worst > 1.5 * max(bounds)


@cache
def _train(work: str, num_ranks: int, options: tuple[str, ...], steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as run_dir:
        settings = [*WORK[work], *COMMON, f"optim.lr={RATE[work]}", *options, f"run.dir={run_dir}"]
        if steps < STEPS:
            settings.append(f"train.stop_at={steps}")
        return run_ranks(ranks.train, num_ranks, settings, timeout_s=280)[0]["losses"]


def train(work: str, num_ranks: int, options: list[str], *, steps: int = STEPS) -> list[float]:
    """The loss of each step."""
    losses = _train(work, num_ranks, tuple(options), steps)
    assert len(losses) == steps
    assert all(map(math.isfinite, losses))
    return losses


def apart(on: list[float], off: list[float], *, window: int = 1) -> float:
    """The largest difference between the means of as many successive steps, as a share of the mean."""
    ends = range(window, len(off) + 1)
    assert len(on) == len(off)
    means = [(sum(on[end - window : end]), sum(off[end - window : end])) for end in ends]
    return max(abs(with_it - without) / without for with_it, without in means)
