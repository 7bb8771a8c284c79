"""The classifier's losses, compared with torch's and timm's, and a run with every augmentation in several layouts."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.data.loader import Batch
from megavit.data.sampler import SampleKey
from megavit.errors import ConfigError
from megavit.task.registry import build_task
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL

LABELS = torch.tensor([0, 3, 3, 9, 5, 1])
LOGITS = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
WEIGHTS = [0.5, 1, 2, 1, 0.25, 3, 1, 1, 0, 1]
MIXED = ["data.mixup=0.8", "data.cutmix=1.0"]


def open_classifier(*overrides: str):
    config = compose(["recipe=digits", *overrides])
    validate(config, 1)
    layout = SimpleNamespace(device=torch.device("cpu"), holds_first_stage=True, holds_last_stage=True)
    return build_task(config.task, model=config.model, data=config.data, num_classes=10, layout=layout, seed=0)


def batch_of(*, augmented: bool) -> Batch:
    keys = [SampleKey(number, 0) for number in range(6)]
    return Batch(None, {"labels": LABELS}, torch.ones(6, dtype=torch.bool), keys, augmented)


def loss(*overrides: str, trains: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    found, sums = open_classifier(*overrides).loss(LOGITS, batch_of(augmented=trains))
    return float(found), sums


def shares(*overrides: str) -> torch.Tensor:
    """Return the class probabilities, one image at a time."""
    mix = open_classifier(*overrides).preprocess.mix(batch_of(augmented=True))
    found = torch.zeros(6, 10)
    for row, share in enumerate(mix.share_B.tolist()):
        found[row, LABELS[row]] += share
        found[row, LABELS[row ^ 1]] += 1 - share
    return found


def test_without_a_loss_named_the_loss_is_torchs_cross_entropy_bit_for_bit():
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing, reduction="none")
        found, sums = loss(f"task.label_smoothing={smoothing}")
        assert found == float(expected.mean())
        assert torch.equal(sums["loss"], expected.sum())


def test_mixed_cross_entropy_is_timms_for_soft_targets():
    timm_loss = pytest.importorskip("timm.loss")
    smooth = shares(*MIXED) * 0.9 + 0.01
    found, sums = loss(*MIXED, "task.label_smoothing=0.1")
    # Measured: 2.4e-7.
    assert found == pytest.approx(float(timm_loss.SoftTargetCrossEntropy()(LOGITS, smooth)), abs=1e-6)
    assert float(sums["loss"]) == pytest.approx(6 * found, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms_on_labels_and_on_mixed_targets(smoothing):
    timm_loss = pytest.importorskip("timm.loss")
    settings = ["task.loss=bce", f"task.label_smoothing={smoothing}"]
    by_label = timm_loss.BinaryCrossEntropy(smoothing=smoothing)(LOGITS, LABELS)
    # Measured: 6e-8.
    assert loss(*settings)[0] == pytest.approx(float(by_label), abs=1e-6)
    smooth = shares(*MIXED) * (1 - smoothing) + smoothing / 10
    by_share = timm_loss.BinaryCrossEntropy(smoothing=0)(LOGITS, smooth)
    assert loss(*settings, *MIXED)[0] == pytest.approx(float(by_share), abs=1e-6)


def test_class_weights_multiply_each_classs_part_and_the_mean_is_over_images():
    setting, weights = f"task.class_weights={WEIGHTS}", torch.tensor(WEIGHTS)
    logs = LOGITS.log_softmax(1)
    assert loss(setting)[0] == pytest.approx(float(-(weights[LABELS] * logs[range(6), LABELS]).mean()), abs=1e-6)
    mixed = -(weights * shares(*MIXED) * logs).sum(1).mean()
    assert loss(setting, *MIXED)[0] == pytest.approx(float(mixed), abs=1e-6)
    one_hot = F.one_hot(LABELS, 10).float()
    parts = -weights * (one_hot * F.logsigmoid(LOGITS) + (1 - one_hot) * F.logsigmoid(-LOGITS))
    assert loss(setting, "task.loss=bce")[0] == pytest.approx(float(parts.mean()), abs=1e-6)


def test_the_validation_loss_has_neither_the_trainings_class_weights_nor_its_smoothing():
    settings = [*MIXED, f"task.class_weights={WEIGHTS}", "task.label_smoothing=0.5"]
    plain = F.cross_entropy(LOGITS, LABELS, reduction="none")
    found, sums = loss(*settings, trains=False)
    assert found == float(plain.mean())
    assert torch.equal(sums["loss"], plain.sum())
    by_class = F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(LABELS, 10).float())
    assert loss(*settings, "task.loss=bce", trains=False)[0] == pytest.approx(float(by_class), abs=1e-7)


def test_the_correct_class_of_a_mixed_image_has_the_larger_weight():
    task = open_classifier(*MIXED)
    right = shares(*MIXED).argmax(1)
    assert not torch.equal(right, LABELS)
    _, sums = task.loss(F.one_hot(right, 10).float(), batch_of(augmented=True))
    assert sums["top1"] == 6
    _, sums = task.loss(F.one_hot(LABELS, 10).float(), batch_of(augmented=False))
    assert sums["top1"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.class_weights=[1,2]"], "task.class_weights has 2 values and data.source=digits has 10 classes"),
        (["task.class_weights=[0,0]"], "must each be at least 0, and one of them above 0"),
        (["task.class_weights=[-1,2]"], "must each be at least 0"),
        (
            ["recipe=digits_mae", "task.loss=bce"],
            "task.loss=bce would be ignored by task.name=mae: it is a setting of task=classify and task=linear_probe;",
        ),
        (["recipe=digits_mae", "task.class_weights=[1]"], "task.class_weights=.* would be ignored by task.name=mae"),
    ],
)
def test_wrong_losses_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        open_classifier(*overrides)


# Colour changes, all transforms on the device, and smoothed, weighted binary cross-entropy.
EVERYTHING = [
    *SMALL,
    *MIXED,
    "train.steps=6",
    "data.random_shift=1",
    "data.auto_augment=randaugment",
    "data.color_jitter=[0.4,0.4,0,0]",
    "data.random_erasing=0.5",
    "data.mixup_prob=0.9",
    "task.loss=bce",
    "task.label_smoothing=0.1",
    f"task.class_weights={WEIGHTS}",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    return run_ranks(ranks.train, 1, [*EVERYTHING, "train.micro_batch=16", f"run.dir={run_dir}"])[0]


@pytest.mark.parametrize(
    ("ranks_needed", "layout"),
    [
        pytest.param(2, ["parallel.tp=2"], id="TP 2"),
        pytest.param(2, ["parallel.pp=2"], id="PP 2"),
        pytest.param(4, ["parallel.tp=2", "parallel.pp=2"], id="TP 2 × PP 2", marks=pytest.mark.slow),
        pytest.param(2, ["train.micro_batch=2"], id="DP 2"),
    ],
)
def test_six_steps_with_everything_equal_those_of_one_rank(ranks_needed, layout, alone, tmp_path, figure):
    got = run_ranks(ranks.train, ranks_needed, [*EVERYTHING, *layout, f"run.dir={tmp_path}"])[0]
    assert len(got["losses"]) == len(alone["losses"]) == 6
    loss = max(abs(a - b) for a, b in zip(got["losses"], alone["losses"], strict=True))
    norm = max(abs(a - b) / b for a, b in zip(got["grad_norms"], alone["grad_norms"], strict=True))
    figure(f"erasing, mixup, cutmix, BCE, {' '.join(layout)}: largest |Δloss| {loss:.1e}, |Δgrad norm| {norm:.1e}")
    # Measured: 6.0e-8 and 3.1e-7.
    assert loss <= 1e-6
    assert norm <= 2e-6
