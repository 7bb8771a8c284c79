"""A run that starts from other weights: positions resized, the classifier if it fits, another network refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megavit.config.validate import validate
from megavit.model.layers.pos_embed import resize_positions, sincos_positions
from tests.checkpoint.convert.test_convert_nemo import nemo_weights
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.test_mae_parity import MAE
from tests.trained import refusal, run_command, train_small

# Twice the digits' size: 64 patches for 16.
LARGER = ["data.source=synthetic", "data.num_classes=10", "data.num_samples=64", "data.image_size=[16,16]"]


def begin(overrides: list[str]) -> dict:
    """Return a run's full weights by timm's names before its first step, its log lines, and the optimizer's copy."""
    from megavit.checkpoint.param_mapping import to_timm
    from megavit.checkpoint.shards import gather_full_state_dict
    from megavit.config.compose import compose
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer
    from tests.reference import dims_of

    config = compose(overrides)
    validate(config, world_size_from_environment())
    trainer = Trainer(config)
    named = {name: param for param, name in trainer.network.parameters.items()}
    full = gather_full_state_dict(named, trainer.layout) or {}
    weights = {name: weight.detach().clone() for name, weight in to_timm(full, dims_of(config)).items()}
    masters = [param for group in trainer.optimizer.param_groups for param in group["params"]]
    return {"weights": weights, "said": trainer.warnings, "masters": sum(float(it.abs().sum()) for it in masters)}


def start(root: Path, *overrides: str, ranks: int = 1) -> dict:
    keys = [*SMALL, "model.num_layers=2", "train.micro_batch=8", f"run.dir={root / 'new'}", *overrides]
    return run_ranks(begin, ranks, keys)[0]


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    """A classifier of the ten digits with a moving average, and the weights of both by timm's names."""
    root = tmp_path_factory.mktemp("former")
    run = train_small(root / "run", "optim.ema=0.8")
    weights = {}
    for name, place in (("last", run), ("average", f"ema:{run}")):
        code, _, err = run_command("convert", f"from={place}", f"to=timm:{root / name}/model.safetensors")
        assert code == 0, err
        weights[name] = load_file(root / name / "model.safetensors")
    return run, weights


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("autoencoder") / "run", *MAE)


@pytest.mark.parametrize(("grid", "to_grid"), [((4, 4), (8, 8)), ((14, 14), (32, 24)), ((7, 9), (3, 4))])
def test_resized_positions_are_a_direct_bicubic_of_the_grid(grid, to_grid):
    torch.manual_seed(0)
    table = torch.randn(1 + grid[0] * grid[1], 1, 6).bfloat16()
    resized = resize_positions(table, class_tokens=1, grid=grid, to_grid=to_grid)
    assert resized.dtype == torch.float32
    assert torch.equal(resized[0], table[0].float())
    for channel in range(6):
        picture = table[1:, 0, channel].float().reshape(1, 1, *grid)
        direct = F.interpolate(picture, to_grid, mode="bicubic", align_corners=False).flatten()
        # Measured: 0.
        assert (resized[1:, 0, channel] - direct).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.tp=2", "train.precision=bf16_o2"]),
        pytest.param(2, ["parallel.pp=2"], marks=pytest.mark.slow),
    ],
)
def test_at_another_resolution_positions_are_resized_and_all_else_is_taken(ranks, layout, former, tmp_path):
    run, weights = former
    got = start(tmp_path, f"init_from={run}", *LARGER, *layout, ranks=ranks)
    wanted = dict(weights["last"])
    table = wanted.pop("pos_embed")[0].unsqueeze(1)
    resized = resize_positions(table, class_tokens=1, grid=(4, 4), to_grid=(8, 8)).transpose(0, 1)
    for name, weight in {**wanted, "pos_embed": resized}.items():
        assert torch.equal(got["weights"][name], weight.to(got["weights"][name].dtype)), name
    assert got["said"][0].endswith("; positions resized from 4×4 to 8×8 patches")


def test_the_optimizers_own_copy_follows(former, tmp_path):
    run, _ = former
    keys = ["train.precision=bf16_o2", "optim=sgd", "optim.lr=0.01"]
    reinitialised, taken = start(tmp_path / "a", *keys), start(tmp_path / "b", *keys, f"init_from={run}")
    for got in (reinitialised, taken):
        # Of bf16 weights in fp32, added up in another order.
        full = sum(float(weight.float().abs().sum()) for weight in got["weights"].values())
        assert got["masters"] == pytest.approx(full, rel=1e-5)
    assert reinitialised["masters"] != pytest.approx(taken["masters"], rel=1e-4)


def test_a_masked_autoencoders_fixed_positions_become_learned_ones_and_its_decoder_is_dropped(autoencoder, tmp_path):
    got = start(tmp_path, f"init_from={autoencoder}", "model.pool=mean", "model.positions=learned")
    fixed = sincos_positions((4, 4), 32, class_tokens=1)
    assert torch.equal(got["weights"]["pos_embed"][0], fixed)
    assert got["said"][0].startswith(f"starts from the weights of {autoencoder}")
    assert got["said"][0].endswith(
        "; head.fc_norm.bias, head.fc_norm.weight, head.out.bias, head.out.weight initialised from scratch"
    )
    other = start(tmp_path, "init_from=null", "model.pool=mean")
    assert not torch.equal(got["weights"]["blocks.1.mlp.fc1.weight"], other["weights"]["blocks.1.mlp.fc1.weight"])


def test_the_prefix_ema_loads_the_moving_average(former, tmp_path):
    run, weights = former
    got = start(tmp_path, f"init_from=ema:{run}", "train.precision=bf16_o2")
    name = "blocks.0.attn.proj.weight"
    assert torch.equal(got["weights"][name], weights["average"][name].bfloat16())
    assert not torch.equal(weights["average"][name], weights["last"][name])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if row["split"] == "val")
    for place, prefix in ((run, ""), (f"ema:{run}", "ema_")):
        code, output, err = run_command("evaluate", f"from={place}")
        assert code == 0, err
        assert f"loss {last[f'{prefix}loss']:.4f}  top1 {last[f'{prefix}top1']:.4f}" in output
    assert (run / "evaluation" / "step_00000020_ema" / "metrics.json").is_file()


def test_the_classifier_stays_only_where_its_classes_are_the_same(former, tmp_path):
    run, weights = former
    same = start(tmp_path / "same", f"init_from={run}")
    assert torch.equal(same["weights"]["head.weight"], weights["last"]["head.weight"])
    assert len(same["said"]) == 1
    assert "initialised from scratch" not in same["said"][0]
    fewer = start(tmp_path / "fewer", f"init_from={run}", "data.classes=['3','8']", "model.head_std=0")
    assert fewer["weights"]["head.weight"].tolist() == [[0.0] * 32] * 2
    # As many classes, in another order.
    others = start(tmp_path / "others", f"init_from={run}", "data.classes=['9','8','7','6','5','4','3','2','1','0']")
    assert not torch.equal(others["weights"]["head.weight"], weights["last"]["head.weight"])
    probe = start(tmp_path / "probe", f"init_from={run}", "task=linear_probe")
    # The same classes, on other features.
    pooled = start(tmp_path / "pooled", f"init_from={run}", "model.pool=mean")
    for said in (fewer, others, probe, pooled):
        assert said["said"][0].endswith("head.out.bias, head.out.weight initialised from scratch")


def test_another_librarys_file_serves_as_it_is_in_any_layout(tmp_path):
    theirs = timm.models.VisionTransformer(
        img_size=24, patch_size=2, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2
    )
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    got = start(tmp_path, f"init_from=timm:{tmp_path / 'model.safetensors'}", "parallel.tp=2", ranks=2)
    wanted = theirs.state_dict()
    table = wanted.pop("pos_embed")[0].unsqueeze(1)
    resized = resize_positions(table, class_tokens=1, grid=(12, 12), to_grid=(4, 4)).transpose(0, 1)
    for name, weight in {**wanted, "pos_embed": resized}.items():
        assert torch.equal(got["weights"][name], weight) is not name.startswith("head."), name
    assert got["said"][0].endswith(
        "resized from 12×12 to 4×4 patches; head.out.bias, head.out.weight initialised from scratch"
    )


def test_an_encoder_alone_of_a_masked_autoencoder_has_its_fixed_positions(autoencoder, tmp_path):
    assert run_command("convert", f"from={autoencoder}", f"to=mae:{tmp_path / 'full.pth'}")[0] == 0
    full = torch.load(tmp_path / "full.pth", weights_only=True)["model"]
    alone = {name: weight for name, weight in full.items() if not name.startswith(("decoder", "mask_token"))}
    torch.save({"model": alone}, tmp_path / "encoder.pth")
    got = start(tmp_path, f"init_from=mae:{tmp_path / 'encoder.pth'}", "task=linear_probe", "model.positions=sincos")
    assert got["said"][0].endswith("encoder.pth; head.out.bias, head.out.weight initialised from scratch")
    assert torch.equal(got["weights"]["blocks.1.mlp.fc2.weight"], full["blocks.1.mlp.fc2.weight"])


def test_maes_classifier_on_images_of_another_normalisation_is_reported(tmp_path):
    theirs = timm.models.VisionTransformer(
        img_size=8, patch_size=2, num_classes=10, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, global_pool="avg",
    )  # fmt: skip
    torch.save({"model": theirs.state_dict()}, tmp_path / "ft.pth")
    data = ["data.source=synthetic", "data.num_classes=10", "data.num_samples=64", "data.channels=3"]
    own = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.image_size=[8,8]"]
    keys = [f"init_from=mae:{tmp_path / 'ft.pth'}", "model.pool=mean", "model.patch_size=2"]
    said = start(tmp_path, *data, *own, *keys)["said"]
    for setting, theirs_is in (("mean", "[0.485, 0.456, 0.406]"), ("std", "[0.229, 0.224, 0.225]")):
        note = f"note: data.{setting} was {theirs_is} when these weights were trained and is [0.5, 0.5, 0.5] here"
        assert note in said


def test_nemos_weights_begin_its_fine_tuning_on_larger_images_with_a_head_of_zeros(tmp_path):
    weights = nemo_weights(two_matrices=True)
    torch.save({"state_dict": weights}, tmp_path / "nemo.ckpt")
    keys = [
        f"init_from=nemo:{tmp_path / 'nemo.ckpt'}", "data.source=synthetic", "data.num_classes=5",
        "data.num_samples=64", "data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]",
        "data.image_size=[40,40]",
        "model.hidden_size=48", "model.ffn_size=80", "model.patch_size=8", "model.class_tokens=8", "model.head_std=0",
        "model.norm_eps=1e-5", "optim=sgd", "optim.lr=0.003",
    ]  # fmt: skip
    got = start(tmp_path, *keys)
    table = weights["model.backbone.position_embeddings.weight"].unsqueeze(1)
    resized = resize_positions(table, class_tokens=8, grid=(3, 3), to_grid=(5, 5)).transpose(0, 1)
    assert torch.equal(got["weights"]["pos_embed"], resized)
    name = "backbone.transformer.layers.1.mlp.dense_4h_to_h.weight"
    assert torch.equal(got["weights"]["blocks.1.mlp.fc2.weight"], weights[f"model.{name}"])
    assert not got["weights"]["head.weight"].any()
    assert "resized from 3×3 to 5×5 patches; head.out.bias, head.out.weight initialised from scratch" in got["said"][0]
    assert "does not state its heads; model.num_heads=4 is used, and 1 is usual" in got["said"][1]


def test_a_file_with_a_part_that_ours_has_no_place_for_is_refused_by_its_name(tmp_path):
    theirs = timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2,
        pre_norm=True,
    )  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    keys = [*SMALL, "model.num_layers=2", "model.patch_bias=false", f"run.dir={tmp_path / 'new'}"]
    output = refusal("train", *keys, f"init_from=timm:{tmp_path / 'model.safetensors'}")
    assert "megavit's network has no weight for norm_pre.bias (2 such weights)" in output


def average(run_dir: str) -> torch.Tensor:
    import megavit

    return megavit.load(f"ema:{run_dir}").vit.blocks[0].attn.proj.weight.detach()


def test_python_loads_the_moving_average(former):
    run, weights = former
    assert torch.equal(run_ranks(average, 1, str(run))[0], weights["average"]["blocks.0.attn.proj.weight"])


@pytest.mark.slow
def test_hugging_faces_folder_serves_as_it_is(former, tmp_path):
    run, weights = former
    assert run_command("convert", f"from={run}", f"to=hf:{tmp_path / 'folder'}")[0] == 0
    got = start(tmp_path, f"init_from=hf:{tmp_path / 'folder'}")
    for name, weight in weights["last"].items():
        assert torch.equal(got["weights"][name], weight), name
    assert got["said"] == [f"starts from the weights of hf:{tmp_path / 'folder'}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.hidden_size=64", "model.num_heads=8"],
            "not fit this network: model.hidden_size is 32 in the weights and 64 here; "
            "model.num_heads is 4 in the weights and 8 here",
        ),
        (["model.num_heads=2"], "model.num_heads is 4 in the weights and 2 here"),
        pytest.param(["model.num_layers=3"], "model.num_layers is 2 in the weights and 3 here", marks=pytest.mark.slow),
        (["model.positions=sincos"], "model.positions is learned in the weights and sincos here"),
        pytest.param(
            ["model.layer_scale=0.1"], "model.layer_scale is null in the weights and 0.1 here", marks=pytest.mark.slow
        ),
        pytest.param(
            ["model.class_tokens=8"], "model.class_tokens is 1 in the weights and 8 here", marks=pytest.mark.slow
        ),
        (["init_from=hf:no/such-model-anywhere"], "init_from=hf:no/such-model-anywhere is not a path here"),
        (["init_from=timm:nowhere.safetensors"], "nowhere.safetensors is not a file"),
        pytest.param(["init_from=nowhere"], "init_from=nowhere holds no checkpoint", marks=pytest.mark.slow),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_what_does_not_fit_is_refused_with_names(settings, message, former, tmp_path):
    run, _ = former
    keys = [*SMALL, "model.num_layers=2", f"run.dir={tmp_path}"]
    own = [] if settings[0].startswith("init_from") else [f"init_from={run}"]
    assert message in refusal("train", *keys, *own, *settings)


def test_a_decoder_of_other_heads_is_refused(autoencoder, tmp_path):
    keys = [*SMALL, *MAE, "model.num_layers=2", f"run.dir={tmp_path}", f"init_from={autoencoder}"]
    assert "task.decoder_num_heads is 2 in the weights and 4 here" in refusal(
        "train", *keys, "task.decoder_num_heads=4"
    )


def test_an_average_that_is_not_there_is_refused(autoencoder, tmp_path):
    assert "holds no moving average of its weights" in refusal("features", f"from=ema:{autoencoder}", f"out={tmp_path}")


def test_an_autoencoder_goes_on_with_its_decoder_and_a_classifiers_encoder_gets_a_new_one(former, tmp_path):
    keys = [*MAE, "model.num_layers=4"]
    first = train_small(tmp_path / "first", *keys)
    interleaved = ["parallel.pp=2", "parallel.vpp=2", "train.micro_batch=4"]
    again = start(tmp_path / "again", *keys, f"init_from={first}", *interleaved, ranks=2)
    assert again["said"] == [f"starts from the weights of {first / 'checkpoints' / 'step_00000020'}"]
    run, _ = former
    other = start(tmp_path / "other", *MAE, "model.positions=learned", f"init_from={run}")
    assert other["said"][0].endswith("step_00000020; mae_decoder.* initialised from scratch")
