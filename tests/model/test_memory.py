"""Compare the bytes that a layer saves for the backward pass with the formula in the documentation."""

import pytest
import torch

from tests.distributed import run_ranks

N, B, H, F = 24, 8, 256, 1024
SETTINGS = [
    f"model.hidden_size={H}",
    f"model.ffn_size={F}",
    "model.num_heads=4",
    "model.num_layers=3",
    "model.class_tokens=8",
    "model.drop_path=0",
    "train.precision=bf16_o2",
]


def saved_bytes(overrides: list[str]) -> tuple[int, int]:
    """Return the bytes of distinct storages, without weights, that the encoder saves on this rank.

    The first number is those after the forward pass, the second the most that recompute saves during the backward pass.
    """
    from megavit.config.compose import compose
    from megavit.model.transformer_block import transformer_config
    from megavit.model.vit import Stage, VisionTransformer
    from megavit.parallel.layout import ParallelLayout

    config = compose(overrides)
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    mcore_config = transformer_config(config.model, config.parallel, layout, stages=[3], dtype=torch.bfloat16)
    chunk = VisionTransformer(
        config.model,
        mcore_config=mcore_config,
        layout=layout,
        stage=Stage(3, 0, config.parallel.recompute, [8, 8], 1),
        num_classes=10,
    ).train()
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(std=0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    tokens = N // layout.tp if layout.sequence_parallel else N
    entering = torch.randn(tokens, B, H, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    alive, most = {}, 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage._cdata] = storage
        return tensor

    class Kept:
        """A tensor that is saved for the backward pass, until its node frees it."""

        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.place = storage._cdata if storage.data_ptr() not in weights else None
            if self.place is not None:
                count, _ = alive.get(self.place, (0, 0))
                alive[self.place] = (count + 1, storage.nbytes())
                most = max(most, sum(size for _, size in alive.values()))

        def __del__(self) -> None:
            if self.place is not None:
                count, size = alive[self.place]
                alive[self.place] = (count - 1, size)
                if count == 1:
                    del alive[self.place]

    seed_everything(layout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        leaving = entering
        if config.parallel.recompute.value == "full":
            leaving = chunk.blocks._checkpointed_forward(leaving, None, None, None, None, None, None, False)
        else:
            for layer in chunk.blocks.layers:
                leaving, _ = layer(leaving)
    total = sum(storage.nbytes() for storage in kept.values())
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        leaving.float().sum().backward()
    return total, most


def seed_everything(layout) -> None:
    from megavit.parallel.rng import seed_step

    seed_step(layout, seed=0, step=0)


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["TP 1", "TP 2", "SP"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_saved_bytes_per_layer_follow_the_formula(recompute, tp, sequence_parallel, figure):
    overrides = [*SETTINGS, f"parallel.tp={tp}", f"parallel.recompute={recompute}"]
    overrides.append(f"parallel.sequence_parallel={sequence_parallel}")
    saved, alive = run_ranks(saved_bytes, tp, overrides)[0]
    measured = saved / 3
    per_token = {"none": 8 + (8 + 4 * F / H) / tp, "selective": 4 + 8 / tp, "full": 2}[recompute]
    if sequence_parallel:
        per_token = {"none": 16 + 4 * F / H, "selective": 12, "full": 2}[recompute] / tp
    formula = N * B * H * per_token
    layout = f"TP {tp}{' + SP' if sequence_parallel else ''}"
    figure(
        f"saved per layer, {recompute} recompute, {layout}: {measured:,.0f} bytes, "
        f"formula {formula:,.0f} ({measured / formula - 1:+.1%})"
    )
    # Norm statistics and the softmax's normaliser come on top: fp32, per token and per token and head.
    assert measured == pytest.approx(formula, rel=0.02 if recompute != "full" else 0.05)
    if recompute == "full":
        full = N * B * H * (8 + (8 + 4 * F / H) / tp if not sequence_parallel else (16 + 4 * F / H) / tp)
        figure(f"alive in the backward pass, full recompute, {layout}: {alive:,} bytes, one layer's {full:,.0f}")
        assert alive == pytest.approx(full, rel=0.02)
