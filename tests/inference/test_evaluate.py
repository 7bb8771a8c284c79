"""Test that an evaluation counts every image once, in any layout, including the uneven last batch."""

import pytest

from megavit.data.sources.digits import Digits
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL, train_torch


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(1, []), (2, []), (2, ["parallel.pp=2"]), (4, ["parallel.tp=2"])],
    ids=["TP 1", "DP 2", "PP 2", "DP 2 × TP 2"],
)
def test_evaluation_equals_plain_torch_over_the_whole_split(world, overrides, tmp_path):
    import torch
    import torch.nn.functional as F

    from megavit.config.compose import compose
    from tests.reference import plain_model

    # 360 images in micro batches of 7 leave 3 for the last; over 2 data-parallel ranks the last pair is uneven too.
    settings = [*SMALL, "train.micro_batch=7", "train.global_batch=14", "train.steps=3"]
    got = run_ranks(ranks.train_and_evaluate, world, [*settings, *overrides, f"run.dir={tmp_path}"])[0]["validation"][
        -1
    ]

    config, source = compose(settings), Digits("val")
    model = plain_model(config)
    model.load_state_dict(train_torch(settings).weights)
    images = torch.stack([source.image(i) for i in range(len(source))]).float() / 255
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    with torch.no_grad():
        logits = model((images - config.data.mean[0]) / config.data.std[0])
    assert got["count"] == len(source) == 360
    assert got["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-12)
    # Measured: 2e-7.
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
