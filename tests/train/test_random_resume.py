"""Stopped and resumed at a random step, with options drawn by a seed: the run that was not stopped, bit for bit."""

import random
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.errors import ConfigError
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL, train_torch

STEPS = 6
LAYOUTS = [
    (1, []),
    (2, []),
    (2, ["parallel.tp=2"]),
    (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "model.class_tokens=8"]),
    (2, ["parallel.pp=2"]),
    (2, ["parallel.pp=2", "parallel.vpp=2"]),
    (4, ["parallel.tp=2", "parallel.pp=2"]),
    (4, ["parallel.tp=2"]),
    (4, ["parallel.pp=2"]),
]
PROBE = ["task=linear_probe"]
TASKS = [
    [],
    ["task=mae", "task.decoder_hidden_size=16", "task.decoder_ffn_size=32", "task.decoder_num_heads=2"],
    PROBE,
]
OPTIMIZERS = [[], ["optim.weight_decay=0.1"], ["optim=sgd", "optim.lr=0.02"], ["optim=lars", "optim.lr=0.5"]]
FROZEN = [
    [],
    ["optim.freeze=[patch_embed.*,cls_token,pos_embed,blocks.0.*,blocks.1.*]"],
    ["optim.freeze=[blocks.2.*,blocks.3.*]"],
]
DROPPED = [
    [],
    [],
    ["model.drop_path=0.3"],
    ["model.hidden_dropout=0.1"],
    ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "model.drop_path=0.2"],
]
# Compiling takes longer than the rest of a draw.
COMPILED_SHARE = 0.12
# Draws of one and two ranks: each task, virtual stages, and compiled layers with drop path in BF16 O2.
QUICK = (10, 14, 36, 45)


def draw(seed: int) -> tuple[int, list[str], int]:
    """Ranks, settings that go together, and the step to stop after."""
    choose = random.Random(seed)
    while True:
        world, layout = choose.choice(LAYOUTS)
        task = choose.choice(TASKS)
        settings = [
            *SMALL,
            f"train.steps={STEPS}",
            *layout,
            *task,
            *choose.choice(OPTIMIZERS),
            *([] if task == PROBE else [*choose.choice(FROZEN), *choose.choice(DROPPED)]),
            f"train.precision={choose.choice(['fp32', 'fp32', 'bf16_o2'])}",
            f"parallel.recompute={choose.choice(['none', 'selective', 'full'])}",
            f"train.compile={'layer' if choose.random() < COMPILED_SHARE else 'none'}",
            f"optim.ema={choose.choice(['null', '0.9'])}",
            f"run.seed={seed}",
        ]
        config = compose(settings)
        if task == PROBE:
            # The statistics of its batch norm are those of all images of the step, as in plain torch.
            settings.append(f"train.micro_batch={16 // config.parallel.data_parallel_size(world)}")
        try:
            validate(compose(settings), world)
        except ConfigError:
            continue
        return world, settings, choose.randint(1, STEPS - 1)


def unbroken_and_resumed(settings: list[str], folder: str, stop: int, backend: str) -> tuple[dict, dict]:
    parts = [*settings, f"run.dir={folder}/parts"]
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        want = ranks.train_and_keep([*settings, f"run.dir={folder}/unbroken"])
        return want, ranks.resume([*parts, f"train.stop_at={stop}"], parts)


def is_plain(settings: list[str]) -> bool:
    """Whether plain torch draws and rounds nothing that megavit does not."""
    drops = any("dropout" in text or text.startswith("model.drop_path=0.") for text in settings)
    return not drops and "train.precision=fp32" in settings


@pytest.mark.parametrize("seed", QUICK)
def test_a_resumed_run_is_the_unbroken_one_whatever_its_options(seed, tmp_path, figure):
    # The graphs run by torch's own kernels: inductor's C++ takes 20 s.
    assert_resumes_bit_equal(seed, tmp_path, figure, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_two_hundred_draws_resume_as_unbroken_runs(seed, tmp_path, figure):
    assert_resumes_bit_equal(seed, tmp_path, figure, backend="inductor")


def assert_resumes_bit_equal(seed: int, folder: Path, figure, *, backend: str) -> None:
    """Compare a drawn run, stopped and resumed, with the unbroken one, and with plain torch where it draws nothing.

    Args:
        seed: of the draw.
        folder: for the runs.
        figure: keeps the measured difference.
        backend: of torch.compile.
    """
    world, settings, stop = draw(seed)
    drawn = " ".join(settings[len(SMALL) :])
    answers = run_ranks(unbroken_and_resumed, world, settings, str(folder), stop, backend)
    for rank, (want, got) in enumerate(answers):
        where = f"rank {rank} of {world}, stopped after {stop}: {drawn}"
        assert got["losses"] == want["losses"], where
        for name, weight in want["weights"].items():
            assert torch.equal(got["weights"][name], weight), f"{name}, {where}"
        assert len(got["averages"]) == len(want["averages"])
        assert all(map(torch.equal, got["averages"], want["averages"])), where
        assert len(got["optimizer"]) == len(want["optimizer"])
        for mine, full in zip(got["optimizer"], want["optimizer"], strict=True):
            assert mine.keys() == full.keys()
            assert all(torch.equal(mine[key], full[key]) for key in full), where
    if is_plain(settings):
        plain = train_torch([text for text in settings if not text.startswith(("parallel.", "train.compile="))]).losses
        losses = [want["losses"][step] for step in range(1, STEPS + 1)]
        worst = max(abs(mine - theirs) for mine, theirs in zip(losses, plain, strict=True))
        figure(f"stopped after {stop} and resumed, {world} ranks, {drawn}: |Δloss| {worst:.1e} against plain torch")
        assert worst <= 5e-6
