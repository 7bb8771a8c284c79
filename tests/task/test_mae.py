"""The masked autoencoder: compared with Hugging Face's and with the constant prediction, and its pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.config.compose import compose
from megavit.config.resolved import resolve_step
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.validate import validate
from megavit.data.sources.digits import Digits
from megavit.errors import ConfigError
from megavit.model.layers.patch_embed import patchify, unpatchify
from megavit.planner.flops import head_flops, layer_flops
from megavit.planner.stage_balance import useful_stages
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.test_mae_parity import GRID, MAE
from tests.trained import run_command, train

SIZES = [
    *MAE,
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.num_heads=4",
    "model.num_layers=3",
]
SHAPES = {
    "square, normalised": [],
    "square, pixels": ["task.norm_pix_loss=false"],
    "12×20 pixels, 3 channels": [
        "data=synthetic",
        "train.steps=10",
        "data.image_size=[12,20]",
        "model.patch_size=4",
        "data.num_classes=2",
        "data.num_samples=64",
        "task.mask_ratio=0.6",
    ],
}


def compare(overrides: list[str]) -> dict[str, float]:
    """Return the largest relative differences of the engine's loss and gradients from Hugging Face's."""
    from benchmarks.step.torch_mae import TorchMae
    from megavit.checkpoint.param_mapping import from_timm, to_timm
    from megavit.model.vit import parameter_names
    from megavit.parallel.layout import ParallelLayout
    from megavit.train.setup import build_model
    from tests.reference import dims_of
    from tests.task import huggingface

    config = compose(overrides)
    validate(config, 1)
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    network = build_model(config, layout, resolve_step(config, layout.world_size, num_classes=10))
    ours = network.chunks["model"]
    plain = TorchMae(
        config.model,
        config.task.decoder(config.model),
        image_size=config.data.image_size,
        channels=config.data.channels,
    )
    theirs = huggingface.build(config, plain.pos_embed, plain.decoder_pos_embed)

    # Convert in both directions, with changed weights in between.
    plain.load_state_dict(to_timm({n: p.detach() for n, p in parameter_names(ours).items()}, dims_of(config)))
    missing = theirs.load_state_dict(huggingface.to_theirs(plain.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and name not in missing.missing_keys:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    plain.load_state_dict(huggingface.from_theirs(theirs.state_dict(), plain.state_dict()))
    loaded = ours.load_state_dict(from_timm(plain.state_dict(), dims_of(config)), strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith("_extra_state") for key in loaded.missing_keys)

    images = torch.randn(6, config.data.channels, *config.data.image_size, generator=generator)
    ids = torch.arange(6)
    from megavit.task.masking import random_keep

    keep = random_keep(ids, ids, ids, config.num_patches, num_kept=config.visible_patches, seed=3)
    network.task.mean_PV = torch.zeros(())
    patches = patchify(images, config.model.patch_size)
    our_loss, _ = network.task.loss(ours(patches, keep), patches, keep, torch.ones(6, dtype=torch.bool))
    their_loss = theirs(images, noise=huggingface.noise_for(keep, config.num_patches)).loss
    our_loss.backward()
    their_loss.backward()
    got = to_timm({name: p.grad for name, p in parameter_names(ours).items()}, dims_of(config))
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    want = huggingface.from_theirs(gradients, got)
    differences = {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in got}
    return {"loss": abs(float(our_loss / their_loss) - 1), "gradient": max(differences.values()), "count": len(got)}


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_hugging_faces(shape, figure):
    found = run_ranks(compare, 1, [*SIZES, *SHAPES[shape]])[0]
    figure(
        f"MAE beside Hugging Face's, {shape}: loss {found['loss']:.1e}, worst of {found['count']} gradients "
        f"{found['gradient']:.1e}, relative"
    )
    assert found["count"] > 60
    assert found["loss"] <= 1e-5
    assert found["gradient"] <= 1e-5


@pytest.mark.parametrize(
    ("layout", "world"),
    [pytest.param(GRID, 4, marks=pytest.mark.slow), ([], 2), (["parallel.pp=2", "parallel.vpp=2"], 2)],
)
def test_validation_and_its_ratio_to_the_mean_image_are_the_same_in_every_layout(layout, world, tmp_path):
    overrides = [*SMALL, *MAE, "train.steps=3", "optim.warmup_steps=1"]
    (want,) = run_ranks(ranks.train_and_evaluate, 1, [*overrides, f"run.dir={tmp_path}/one"])[0]["validation"]
    (got,) = run_ranks(ranks.train_and_evaluate, world, [*overrides, *layout, f"run.dir={tmp_path}/more"])[0][
        "validation"
    ]
    assert got["count"] == want["count"] == 360
    for name in ("loss", "loss_ratio"):
        assert got[name] == pytest.approx(want[name], rel=2e-6)


def test_the_mean_image_is_the_best_constant_prediction(tmp_path):
    """A decoder that predicts the mean image has a ratio of 1 on all 1,437 digits, any other constant a larger one."""
    found = run_ranks(guess_constants, 1, [*SMALL, *MAE, "task.baseline_samples=2000", f"run.dir={tmp_path}"])[0]
    assert found["mean"] == pytest.approx(1, abs=1e-6)
    assert found["more"] > 1.001
    assert found["less"] > 1.001
    assert torch.allclose(found["mean_PV"], found["by hand"], atol=1e-5)


def guess_constants(overrides: list[str]) -> dict:
    from megavit.data.transforms.normalize import Normalize
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    trainer = Trainer(config)
    task, source = trainer.task, Digits("train")
    images = Normalize(config.data.mean, config.data.std)(torch.stack([source.image(i) for i in range(len(source))]))
    patches = patchify(images, config.model.patch_size)
    ids = torch.arange(len(source))
    from megavit.task.masking import random_keep

    keep = random_keep(ids, ids, ids, 16, num_kept=4, seed=0)
    ones = torch.ones(len(source), dtype=torch.bool)
    mean = task.mean_PV.expand(len(source), -1, -1)
    ratios = {
        name: task.metrics({key: float(value) for key, value in task.loss(guess, patches, keep, ones)[1].items()})
        for name, guess in {"mean": mean, "more": mean + 0.1, "less": mean - 0.1}.items()
    }
    return {
        **{name: value["loss_ratio"] for name, value in ratios.items()},
        "mean_PV": task.mean_PV,
        "by hand": task.target(patches).mean(dim=0),
    }


def test_patches_go_back_to_where_they_were():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), (2, 3), 4), images)


@pytest.mark.parametrize(("model", "cost"), [("vit_b16", 15.0), ("vit_l16", 8.5), ("vit_h14", 5.5)])
def test_the_decoder_costs_as_many_encoder_layers_as_the_design_says(model, cost):
    recipe = f"recipe=mae_{model.removeprefix('vit_')}_800ep"
    shape = compose([recipe, "data.path=/data"]).network_shape(num_classes=0)
    assert head_flops(shape) / layer_flops(shape) == pytest.approx(cost, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (["model=vit_ti16"], (192, 768, 3, 4)),
        (["model=vit_b16"], (512, 2048, 16, 4)),
        (["model=vit_G14"], (512, 2048, 16, 8)),
        (["model.num_layers=2", "model.hidden_size=96", "model.ffn_size=100", "model.num_heads=4"], (96, 100, 4, 1)),
        # 66 is no multiple of 4; 64 is, and has 16 heads.
        (["model.hidden_size=66"], (64, 256, 16, 4)),
        (["model=vit_b16", "task.decoder_hidden_size=24", "task.decoder_num_layers=2"], (24, 96, 8, 2)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_without_a_recipe_the_decoder_is_no_wider_than_its_encoder_and_a_third_as_deep(settings, want):
    config = compose(["recipe=null", "task=mae", "data=synthetic", "train.steps=1", *settings])
    validate(config, 1)
    task = config.task
    sizes = (task.decoder_hidden_size, task.decoder_ffn_size, task.decoder_num_heads, task.decoder_num_layers)
    assert sizes == want
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("size", ["b16", "l16", "h14"])
@pytest.mark.parametrize("epochs", [800, 1600])
def test_the_papers_recipes_have_the_papers_decoder_and_do_not_clip(size, epochs):
    config = compose([f"recipe=mae_{size}_{epochs}ep", "data.path=/data"])
    task = config.task
    assert (task.decoder_hidden_size, task.decoder_ffn_size) == (512, 2048)
    assert (task.decoder_num_heads, task.decoder_num_layers, config.optim.clip_grad) == (16, 8, 0)


def costly_decoder(overrides: list[str]) -> str:
    from megavit.train.summary import describe_costly_decoder

    return describe_costly_decoder(compose(overrides).network_shape(num_classes=0))


def test_a_decoder_that_costs_more_than_its_encoder_is_reported():
    settings = ["recipe=null", "task=mae", "data=synthetic"]
    (said,) = run_ranks(costly_decoder, 1, [*settings, "model=vit_ti16"])
    # 4 layers on 197 tokens and the pixels against 12 layers on 50 and the patches: 878 MFLOP against 569.
    assert said.startswith(", 1.5 times the full encoder: fewer task.decoder_num_layers")
    assert run_ranks(costly_decoder, 1, [*settings, "model=vit_b16"]) == [""]


def test_stages_that_only_wait_for_the_decoder_are_named():
    assert useful_stages(12, 4, last_cost=15.0) == 2
    assert useful_stages(24, 4, last_cost=8.5) == 4
    assert useful_stages(32, 16, last_cost=5.5) == 8


def idle_stages(overrides: list[str]) -> list[str]:
    from megavit.train.summary import idle_stages

    config = compose(overrides)
    return list(idle_stages(config, config.network_shape(num_classes=0)))


def test_a_run_warns_if_more_stages_cannot_help():
    settings = ["recipe=mae_b16_800ep", "data.path=/data"]
    (said,) = run_ranks(idle_stages, 1, [*settings, "parallel.pp=4"])[0]
    assert "parallel.pp=4 is no faster than 2" in said
    assert "15.0 of 27.1 encoder layers" in said
    assert "at most 1.8 times one stage's speed" in said
    assert run_ranks(idle_stages, 1, [*settings, "parallel.pp=2"])[0] == []


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["task.mask_ratio=0.99"], 1, r"task.mask_ratio=0.99 keeps 0 of 16 patches: int\(16 × \(1 − 0.99\)\) = 0"),
        (["task.mask_ratio=0"], 1, r"task.mask_ratio=0.0 keeps 16 of 16 patches"),
        (["task.mask_ratio=1"], 1, r"task.mask_ratio=1.0 must be"),
        (["data.image_size=[9,8]"], 1, r"9 mod 2 = 1"),
        (
            ["parallel.tp=4"],
            4,
            r"task.decoder_num_heads=2 is not divided by parallel.tp=4: 2 mod 4 = 2; set parallel.tp=2",
        ),
        (
            ["task.decoder_num_heads=5"],
            1,
            r"task.decoder_hidden_size=24 is not divisible by task.decoder_num_heads=5: 24 mod 5",
        ),
        (
            ["parallel.tp=2", "parallel.sequence_parallel=true"],
            2,
            r"splits 4 patches \(task.mask_ratio=0.75 hides 12\) \+ 1 class tokens = 5 tokens .* model.class_tokens=8",
        ),
        (["model.pool=mean"], 1, r"model.pool=mean would be ignored by task.name=mae"),
        (["model.head=tanh_mlp"], 1, r"model.head=tanh_mlp would be ignored by task.name=mae"),
        (["task.label_smoothing=0.1"], 1, r"task.label_smoothing=0.1 would be ignored by task.name=mae"),
        (["task.mask_ratio=null"], 1, r"task.mask_ratio: .*not Optional"),
        (["task=classify", "metrics.pictures_every=5"], 1, r"nothing to paint"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_settings_are_refused_with_the_way_out(overrides, world, message):
    mae = [] if "task=classify" in overrides else SIZES
    with pytest.raises(ConfigError, match=message) as refused:
        validate(compose([*mae, *overrides]), world)
    assert "\n" not in str(refused.value)


def test_a_run_draws_pictures_and_its_checkpoint_reconstructs_other_images(tmp_path):
    run_dir, images = tmp_path / "run", tmp_path / "images"
    overrides = [
        *SMALL,
        *MAE,
        "train.steps=2",
        "optim.warmup_steps=1",
        "metrics.pictures_every=1",
        f"run.dir={run_dir}",
    ]
    train([*overrides, "parallel.pp=2", "train.precision=bf16_o2"], ranks=2)
    assert {path.name for path in (run_dir / "pictures").iterdir()} == {
        "curves.png", "val_00000001.png", "val_00000002.png",
    }  # fmt: skip
    images.mkdir()
    for index in range(3):
        Image.fromarray(Digits("val").image(index)[0].numpy()).save(images / f"{index}.png")
    code, output, err = run_command("reconstruct", f"from={run_dir}", f"images={images}", "count=2")
    assert code == 0, err
    assert "2 of 3 images" in output
    assert np.asarray(Image.open(run_dir / "pictures" / "reconstruct.png")).std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs from="),
        (["from=nowhere", "images=."], "from=nowhere holds no checkpoint"),
        (["form=x", "images=."], "did you mean from="),
        (["x"], "'x' is no setting"),
    ],
)
def test_reconstruct_refuses_what_it_cannot_read(arguments, message):
    from megavit.cli.main import run

    with pytest.raises(ConfigError, match=message):
        run(["reconstruct", *arguments])
