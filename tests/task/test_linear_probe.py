"""Frozen weights and the linear probe: equal to plain torch in any layout, and exported as an ordinary classifier."""

import json

import pytest
import timm
import torch

from megavit.data.sources.digits import Digits
from megavit.model.layers.patch_embed import patchify
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL, train_torch
from tests.train.test_parity import largest_differences
from tests.trained import refusal, run_command, train_small

PROBE = ["task=linear_probe", "optim=lars", "optim.lr=2", "optim.weight_decay=0"]
# The statistics cover all of a step's images, whichever rank holds them.
LAYOUTS = {
    "TP 2 × PP 2": (4, ["parallel.tp=2", "parallel.pp=2", "train.micro_batch=16"]),
    "DP 2": (2, ["train.micro_batch=8"]),
    "TP 2": (2, ["parallel.tp=2", "train.micro_batch=16"]),
}


@pytest.mark.parametrize("layout", ["TP 2 × PP 2", "DP 2", pytest.param("TP 2", marks=pytest.mark.slow)])
def test_a_probe_learns_as_in_plain_torch_and_its_encoder_stays_to_the_bit(layout, tmp_path, figure):
    world, own = LAYOUTS[layout]
    want = train_torch([*SMALL, *PROBE])
    got = run_ranks(ranks.train, world, [*SMALL, *PROBE, *own, f"run.dir={tmp_path}"])[0]
    loss, norm = largest_differences(got, want)
    worst = max((got["weights"][name] - want.weights[name]).abs().max() for name in ("head.weight", "head.bias"))
    figure(
        f"linear probe, {layout}: |Δloss| {loss:.1e}, |Δgrad norm| {norm:.1e}, head {worst:.1e}, against plain torch"
    )
    # Measured: 4.8e-7, 2e-7 and 1e-7.
    assert loss <= 2e-6
    assert norm <= 2e-6
    assert worst <= 2e-6
    untouched = train_torch([*SMALL, "task=linear_probe", "optim.lr=0"])
    for name, weight in untouched.weights.items():
        assert torch.equal(got["weights"][name], weight) is not name.startswith("head."), name


def test_a_frozen_pipeline_stage_and_a_frozen_layer_stay_and_the_others_learn_as_in_plain_torch(tmp_path, figure):
    # The first of two stages, and the layer after it.
    frozen = "optim.freeze=[patch_embed.*,cls_token,pos_embed,blocks.0.*,blocks.1.*,blocks.2.mlp.*]"
    want = train_torch([*SMALL, frozen])
    got = run_ranks(ranks.train, 2, [*SMALL, frozen, "parallel.pp=2", f"run.dir={tmp_path}"])[0]
    loss, norm = largest_differences(got, want)
    figure(f"frozen in part, PP 2: |Δloss| {loss:.1e}, |Δgrad norm| {norm:.1e}, against plain torch")
    assert loss <= 2e-6
    assert norm <= 2e-6
    start = train_torch([*SMALL, "optim.lr=0"]).weights
    stays = [name for name, weight in start.items() if torch.equal(got["weights"][name], weight)]
    expected = ("patch_embed.", "cls_token", "pos_embed", "blocks.0.", "blocks.1.", "blocks.2.mlp.")
    assert stays == [name for name in start if name.startswith(expected)]


@pytest.mark.parametrize(
    ("ways", "world"),
    [
        (["parallel.recompute=full"], 1),
        pytest.param(["parallel.recompute=selective"], 1, marks=pytest.mark.slow),
        (["parallel.recompute=selective", "parallel.tp=2", "parallel.sequence_parallel=true"], 2),
    ],
    ids=lambda value: None if isinstance(value, int) else value[0],
)
def test_recomputed_layers_above_a_frozen_embedding_learn_as_in_plain_torch(ways, world, tmp_path):
    frozen = [*SMALL, "model.class_tokens=8", "optim.freeze=[patch_embed.*,cls_token,pos_embed,blocks.0.*]"]
    want = train_torch(frozen)
    got = run_ranks(ranks.train, world, [*frozen, *ways, f"run.dir={tmp_path}"])[0]
    loss, norm = largest_differences(got, want)
    # Measured: 4.8e-7 and 2e-7.
    assert loss <= 2e-6
    assert norm <= 2e-6


def test_a_pattern_matches_timms_names_only(tmp_path):
    start = train_torch([*SMALL, "optim.lr=0"]).weights
    got = run_ranks(ranks.train, 1, [*SMALL, "optim.freeze=['blocks.*']", f"run.dir={tmp_path}"])[0]["weights"]
    stays = [name for name, weight in start.items() if torch.equal(got[name], weight)]
    assert stays == [name for name in start if name.startswith("blocks.")]


def norm_a_bad_batch() -> tuple[bool, bool]:
    import torch.distributed as dist

    from megavit.model.layers.head import FeatureNorm
    from megavit.parallel.config import ParallelConfig
    from megavit.parallel.layout import ParallelLayout

    ParallelLayout.create(ParallelConfig(), timeout_s=60)
    norm = FeatureNorm(4, group=dist.group.WORLD)
    norm(torch.randn(8, 4))
    before = norm.running_mean.clone()
    norm(torch.tensor([[torch.nan, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 5.0]]))
    finite = torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()
    return bool(finite), torch.equal(before, norm.running_mean)


def test_a_batch_that_is_not_finite_does_not_stay_in_the_statistics():
    assert run_ranks(norm_a_bad_batch, 1)[0] == (True, False)


def test_a_run_is_not_resumed_with_other_weights_frozen_and_a_resume_does_not_warn(tmp_path):
    keys = [*SMALL, "train.steps=2", "optim.warmup_steps=1", "task=linear_probe", f"run.dir={tmp_path / 'probe'}"]
    assert "frozen with random initial weights" in run_command("train", *keys, "train.stop_at=1")[1]
    code, output, err = run_command("train", *keys)
    assert code == 0, err
    assert "frozen with random initial weights" not in output
    other = [*SMALL, "train.steps=2", "optim.warmup_steps=1", f"run.dir={tmp_path / 'other'}"]
    assert run_command("train", *other, "train.stop_at=1")[0] == 75
    assert "optim.freeze was null and is ['pos_embed']" in refusal("train", *other, "optim.freeze=[pos_embed]")
    assert "optim.layer_decay was null and is 0.5" in refusal("train", *other, "optim.layer_decay=0.5")


def kept_for_the_backward_pass(overrides: list[str]) -> tuple[int, bool]:
    """Return the bytes that the first stage saves for the backward pass, and whether its output requires a gradient."""
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    trainer = Trainer(compose(overrides))
    (chunk,) = trainer.chunks.values()
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    images = torch.zeros(4, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        tokens = chunk.encode(patchify(images, chunk.patch_size))
    return kept, tokens.requires_grad


def test_a_frozen_encoder_saves_nothing_for_a_backward_pass(tmp_path):
    keys = [*SMALL, f"run.dir={tmp_path}"]
    assert run_ranks(kept_for_the_backward_pass, 1, [*keys, *PROBE])[0] == (0, False)
    kept, wants_gradient = run_ranks(kept_for_the_backward_pass, 1, keys)[0]
    assert kept > 100_000
    assert wants_gradient


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Train a probe on the encoder of a run; return its folder and its log."""
    root = tmp_path_factory.mktemp("probe")
    train_small(root / "run")
    run = train_small(
        root / "probe", "task=linear_probe", "optim.lr=0.05", "data.random_shift=0", f"init_from={root / 'run'}"
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, next(row for row in reversed(rows) if row["split"] == "val")


def scores(run_dir: str) -> torch.Tensor:
    import megavit

    with torch.no_grad():
        return megavit.load(run_dir)(torch.stack([Digits("val").image(index) for index in range(360)]))


def test_a_probe_is_exported_as_an_ordinary_classifier(probed, tmp_path):
    run, last = probed
    assert 0.2 < last["top1"] < 1
    logits = run_ranks(scores, 1, str(run))[0]
    labels = torch.tensor([Digits("val").label(index) for index in range(360)])
    assert (logits.argmax(dim=1) == labels).float().mean() == pytest.approx(last["top1"], abs=1e-6)
    code, output, err = run_command("evaluate", f"from={run}")
    assert code == 0, err
    assert f"loss {last['loss']:.4f}  top1 {last['top1']:.4f}" in output
    assert run_command("convert", f"from={run}", f"to=timm:{tmp_path / 'probe.safetensors'}")[0] == 0
    theirs = timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2
    )
    timm.models.load_checkpoint(theirs, str(tmp_path / "probe.safetensors"))
    images = torch.stack([Digits("val").image(index) for index in range(360)]).float() / 255
    with torch.no_grad():
        difference = (theirs.eval()((images - 0.305) / 0.376) - logits).abs().max()
    # Measured: 1e-6.
    assert difference <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["optim.freeze=[blocks.9.*]"],
            "optim.freeze: blocks.9.* matches no weight of this network; examples: blocks.0.*, ",
        ),
        (["optim.freeze=['*']"], "optim.freeze=['*'] freezes all weights, so nothing trains"),
        ([*PROBE, "model.drop_path=0.1"], "model.drop_path=0.1 does not fit task.name=linear_probe"),
        pytest.param(
            [*PROBE, "model.head=tanh_mlp"],
            "model.head=tanh_mlp does not fit task.name=linear_probe",
            marks=pytest.mark.slow,
        ),
        ([*PROBE, "optim.freeze=[encoder]"], "which freezes the encoder itself; set it to null"),
        pytest.param([*PROBE, "optim.momentum=null"], "optim.name=lars needs optim.momentum", marks=pytest.mark.slow),
        (["optim.trust_coefficient=0.1"], "optim.trust_coefficient=0.1 would be ignored by optim.name=adamw"),
        pytest.param(["optim.layer_decay=1.5"], "optim.layer_decay=1.5 must be below 1", marks=pytest.mark.slow),
        (["optim.layer_decay=0.5", "optim.freeze=[encoder]"], "optim.layer_decay=0.5 would be ignored"),
        (["optim.freeze=[]"], "optim.freeze=[] freezes nothing"),
        pytest.param(["model.head_std=-1"], "model.head_std=-1", marks=pytest.mark.slow),
    ],
    ids=lambda value: None if isinstance(value, str) else value[-1],
)
def test_settings_that_do_not_fit_a_probe_are_refused(settings, message, tmp_path):
    assert message in refusal("train", *SMALL, *settings, f"run.dir={tmp_path}")
