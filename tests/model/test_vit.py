"""The network is bidirectional and equals timm's; tensor-parallel ranks agree under every dropout."""

import pytest
import torch

from megavit.checkpoint.param_mapping import from_timm, to_timm
from megavit.config.compose import compose
from megavit.model.layers.patch_embed import patchify
from megavit.model.torch_vit import TorchViT
from tests.distributed import run_ranks
from tests.reference import SMALL, dims_of


def build_chunk(overrides: list[str]):
    """Build this rank's chunk of the model in the layout of the overrides."""
    from megavit.model.init import initialise
    from megavit.model.transformer_block import transformer_config
    from megavit.model.vit import Stage, VisionTransformer
    from megavit.parallel.layout import ParallelLayout
    from megavit.parallel.rng import seed_step
    from megavit.parallel.stages import plan_stages, rank_stages

    config = compose(overrides)
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    stages = plan_stages(config.parallel, config.network_shape(num_classes=10))
    mcore_config = transformer_config(config.model, config.parallel, layout, stages=stages, dtype=torch.float32)
    (num_layers,) = rank_stages(stages, config.parallel, layout.pp_rank)
    chunk = VisionTransformer(
        config.model,
        mcore_config=mcore_config,
        layout=layout,
        stage=Stage(num_layers, 0, config.parallel.recompute, config.data.image_size, config.data.channels),
        num_classes=10,
    )
    initialise(chunk, config.model, layout, seed=config.run.seed)
    seed_step(layout, seed=config.run.seed, step=0)
    return chunk, config, layout


def logits_of(overrides: list[str], images: torch.Tensor, weights: dict | None, training: bool) -> torch.Tensor:
    chunk, config, _ = build_chunk(overrides)
    if weights is not None:
        missing = chunk.load_state_dict(from_timm(weights, dims_of(config)), strict=False)
        assert not missing.unexpected_keys
        assert all(name.endswith("_extra_state") for name in missing.missing_keys)
    return chunk.train(training)(images).detach()


@pytest.mark.slow  # The quick suite converts small models of timm, test_convert.py.
def test_timm_vit_b16_gives_the_same_logits(figure):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = timm.create_model("vit_base_patch16_224", num_classes=1000).eval()
    with torch.no_grad():
        # timm starts biases and norms at constants that would hide a swapped name.
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    settings = ["model=vit_b16", "model.drop_path=0", "data.image_size=[224,224]", "data.channels=3"]
    settings += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    config = compose(settings)
    plain = TorchViT(config.model, image_size=[224, 224], channels=3, num_classes=1000).eval()
    plain.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        want = reference(images)
        worst_plain = (plain(images) - want).abs().max()
    got = run_ranks(timm_logits, 1, settings, images, reference.state_dict())[0]
    worst = (got - want).abs().max()
    figure(f"timm's ViT-B/16: largest |Δlogit| {worst:.1e} of the engine, {worst_plain:.1e} of the plain ViT")
    # Measured: 4e-6 and 0.
    assert worst <= 1e-5
    assert worst_plain <= 1e-5


def timm_logits(settings: list[str], images: torch.Tensor, weights: dict) -> torch.Tensor:
    from megavit.model import vit

    original = vit.ClassifierHead

    def head_of_1000(config, **own):
        return original(config, **{**own, "num_classes": 1000})

    vit.ClassifierHead = head_of_1000
    try:
        return logits_of(settings, images, weights, False)
    finally:
        vit.ClassifierHead = original


@pytest.mark.parametrize("world", [1, 2])
def test_permuting_patches_with_their_positions_leaves_the_class_token_unchanged(world):
    before, after = run_ranks(permuted_logits, world, [*SMALL, f"parallel.tp={world}"])[0]
    assert not before.equal(after)
    # Measured: 2.4e-7; causal attention gives 1e-1.
    assert (before - after).abs().max() <= 2e-6


def permuted_logits(overrides: list[str]):
    chunk, _, _ = build_chunk(overrides)
    chunk.eval()
    torch.manual_seed(1)
    images = torch.randn(3, 1, 8, 8)
    before = chunk(images)
    order = torch.randperm(16)
    # The permuted image has the original's patches in another order; the rows of the positions are permuted too.
    patches = patchify(images, 2)[:, order]
    shuffled = patches.view(3, 4, 4, 1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 1, 8, 8)
    with torch.no_grad():
        chunk.embed.pos_embed[1:] = chunk.embed.pos_embed[1:][order]
    return before.detach(), chunk(shuffled).detach()


DROPS = ["model.hidden_dropout=0.2", "model.attention_dropout=0.2", "model.drop_path=0.5"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_agree_whatever_is_dropped(sequence_parallel):
    overrides = [*SMALL, *DROPS, "parallel.tp=2", "model.class_tokens=8"]
    overrides.append(f"parallel.sequence_parallel={sequence_parallel}")
    images = torch.randn(4, 1, 8, 8)
    first, second = run_ranks(logits_of, 2, overrides, images, None, True)
    assert torch.equal(first, second)
    evaluated = run_ranks(logits_of, 2, overrides, images, None, False)
    assert not torch.allclose(first, evaluated[0], atol=1e-3), "nothing was dropped"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_drop_different_attention_weights_and_the_same_images(sequence_parallel):
    overrides = [*SMALL, *DROPS, "parallel.tp=2", "model.class_tokens=8"]
    overrides.append(f"parallel.sequence_parallel={sequence_parallel}")
    first, second = run_ranks(what_a_layer_drops, 2, overrides)
    assert not torch.equal(first["attention"], second["attention"])
    assert torch.equal(first["images"], second["images"])
    # Ranks drop different tokens if tokens are split, and the same if they are replicated.
    assert torch.equal(first["tokens"], second["tokens"]) is not sequence_parallel


def what_a_layer_drops(overrides: list[str]):
    """Return the outputs of the last layer's parts for the same inputs on every rank."""
    from contextlib import nullcontext

    from megatron.core import tensor_parallel

    chunk, _, layout = build_chunk(overrides)
    layer = chunk.blocks.layers[-1].train()
    same = torch.ones(2, 2, 24, 8)
    with tensor_parallel.get_cuda_rng_tracker().fork() if layout.sequence_parallel else nullcontext():
        attention = layer.attn._mix(same, same, same)
        images = layer.drop_path.draw(torch.ones(24, 64, 32), branches=2)
        tokens = layer.residual1(torch.zeros(24, 64, 32), torch.ones(24, 64, 32), None)
    return {"attention": attention, "images": images, "tokens": tokens.detach()}


def test_replicated_weights_stay_equal_on_tensor_parallel_ranks_when_trained_with_dropout(tmp_path):
    from tests import ranks

    for name, sequence_parallel in [("tp", "false"), ("sp", "true")]:
        overrides = [*SMALL, *DROPS, "parallel.tp=2", "model.class_tokens=8", f"run.dir={tmp_path}/{name}"]
        overrides += [f"parallel.sequence_parallel={sequence_parallel}", "train.steps=4"]
        first, second = run_ranks(ranks.train_and_keep, 2, overrides)
        replicated = [key for key in first["weights"] if not any(part in key for part in ("qkv", "fc1"))]
        replicated = [key for key in replicated if not key.endswith(("attn.proj.weight", "mlp.fc2.weight"))]
        assert len(replicated) > 20
        for key in replicated:
            assert torch.equal(first["weights"][key], second["weights"][key]), key


def test_drop_path_drops_complete_images_and_keeps_the_mean():
    outputs = run_ranks(drop_path_branch, 1)[0]
    kept = outputs.flatten(1).unique(dim=1)
    assert kept.shape[1] == 1, "all values of an image are dropped together"
    share = (kept[:, 0] > 0).float().mean().item()
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    # 4000 samples of probability 0.75: one standard deviation is 0.007.
    assert share == pytest.approx(0.75, abs=0.035)


def drop_path_branch() -> torch.Tensor:
    from megavit.model.layers.drop_path import DropPath, Residual

    chunk, _, _ = build_chunk(SMALL)
    residual, branch = Residual(chunk.config, layer_scale=None).train(), torch.ones(4000, 3, 8)
    (keep,) = DropPath(0.25, sequence_parallel=False).draw(branch, branches=1)
    return residual(torch.zeros(4000, 3, 8), branch, keep)


def test_drop_path_rises_linearly_over_the_layers_of_all_stages():
    per_rank = run_ranks(drop_path_rates, 2, [*SMALL, "parallel.pp=2", "model.drop_path=0.3"])
    assert per_rank[0] + per_rank[1] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def drop_path_rates(overrides: list[str]) -> list[float]:
    return [layer.drop_path.rate for layer in build_chunk(overrides)[0].blocks.layers]


def test_weight_names_convert_to_the_torch_model_and_back():
    extras = ["model.layer_scale=0.1", "model.qk_norm=true", "model.head=tanh_mlp", "model.class_tokens=8"]
    for pool in ("cls", "mean"):
        config = compose([*SMALL, *extras, f"model.pool={pool}"])
        plain = TorchViT(config.model, image_size=[8, 8], channels=1, num_classes=10)
        weights = {name: torch.randn_like(weight) for name, weight in plain.state_dict().items()}
        dims = dims_of(config)
        back = to_timm(from_timm(weights, dims), dims)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def test_patchify_is_a_strided_convolution():
    images, weight = torch.randn(2, 3, 12, 8), torch.randn(5, 3, 4, 4)
    convolved = torch.nn.functional.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(images, 4) @ weight.flatten(1).T, convolved, atol=1e-4, rtol=0)


def test_missing_transformer_engine_is_named_in_the_error():
    pytest.importorskip("megatron.core")
    with pytest.raises(AssertionError, match=r"pip install 'megavit\[te\]'.*model\.linear_backend=local"):
        run_ranks(build_only, 1, [*SMALL, "model.linear_backend=te"])


def build_only(overrides: list[str]) -> None:
    build_chunk(overrides)
