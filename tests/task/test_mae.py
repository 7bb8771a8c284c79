"""The masked autoencoder against Hugging Face's, the constant guess, the pictures."""

import pytest
import torch

from megavit.compose import compose
from megavit.testing import run_ranks
from tests.test_mae_parity import MAE

SIZES = [
    *MAE,
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.num_heads=4",
    "model.num_layers=3",
]
SHAPES = {
    "square, normalised": [],
    "square, pixels": ["task.norm_pix=false"],
    "12×20 pixels, 3 channels": [
        "data=synthetic",
        "data.image_size=[12,20]",
        "model.patch_size=4",
        "data.num_classes=2",
        "data.num_samples=64",
        "task.mask_ratio=0.6",
    ],
}


def compare(overrides: list[str]) -> dict[str, float]:
    """Loss and gradients of our engine beside Hugging Face's: the largest relative differences."""
    from megavit.checkpoint.names import from_plain, to_plain
    from megavit.model.plain_mae import PlainMae
    from megavit.model.vit import parameter_names
    from megavit.network import build_network
    from megavit.parallel.layout import ParallelLayout
    from tests import huggingface
    from tests.reference import dims_of

    config = compose(overrides)
    config.check(1)
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    network = build_network(config, layout, num_classes=10)
    ours = network.chunks["model"]
    plain = PlainMae(
        config.model,
        config.task.decoder(config.model),
        image_size=config.data.image_size,
        channels=config.data.channels,
    )
    theirs = huggingface.build(config, plain.pos_embed, plain.decoder_pos_embed)

    # Both ways: ours to theirs, changed there, and back.
    plain.load_state_dict(to_plain({n: p.detach() for n, p in parameter_names(ours).items()}, dims_of(config)))
    missing = theirs.load_state_dict(huggingface.to_theirs(plain.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and name not in missing.missing_keys:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    plain.load_state_dict(huggingface.from_theirs(theirs.state_dict(), plain.state_dict()))
    loaded = ours.load_state_dict(from_plain(plain.state_dict(), dims_of(config)), strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith("_extra_state") for key in loaded.missing_keys)

    images = torch.randn(6, config.data.channels, *config.data.image_size, generator=generator)
    ids = torch.arange(6)
    from megavit.task.masking import random_keep

    keep = random_keep(ids, ids, ids, config.num_patches, num_kept=config.seen_patches, seed=3)
    network.task.mean_PV = torch.zeros(())
    our_loss, _ = network.task.loss(ours(images, keep), images, keep, torch.ones(6, dtype=torch.bool))
    their_loss = theirs(images, noise=huggingface.noise_for(keep, config.num_patches)).loss
    our_loss.backward()
    their_loss.backward()
    got = to_plain({name: p.grad for name, p in parameter_names(ours).items()}, dims_of(config))
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
