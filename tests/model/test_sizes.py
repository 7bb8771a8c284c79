"""Parameter counts of the named sizes, and the layout of the largest on 32 ranks without allocating its memory."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.validate import validate
from tests.distributed import run_ranks

IMAGENET = ["data=synthetic", "train.steps=10", "optim.warmup_steps=0"]
# Hand-checked: V·h + h patches, tokens·h positions, h class token, 12h² + … layers; 224 px, 1000 classes.
MILLIONS = {
    "vit_ti16": 5.7,
    "vit_s16": 22.1,
    "vit_b16": 86.6,
    "vit_l16": 304.3,
    "vit_h16": 632.2,
    "vit_h14": 632.0,
    "vit_g14": 1012.6,
    "vit_G14": 1844.4,
}
NEMO = ["model.class_tokens=8", "model.patch_bias=false", "model.head=tanh_mlp"]


def arithmetic(model: str, *overrides: str) -> int:
    config = compose([*IMAGENET, f"model={model}", *overrides])
    m, k, tokens = config.model, config.data.num_classes, config.model.num_tokens(config.data.image_size)
    h, f = m.hidden_size, m.ffn_size
    layer = (3 * h * h + 3 * h) + (h * h + h) + (h * f + f) + (f * h + h) + 4 * h
    embedding = 3 * m.patch_size**2 * h + (h if m.patch_bias else 0) + (tokens + m.class_tokens) * h
    head = h * k + k + (h * h + h if m.head.value == "tanh_mlp" else 0)
    return m.num_layers * layer + embedding + 2 * h + head


def parameters_per_rank(overrides: list[str], tp: int, pp: int) -> list[int]:
    """Return the parameters of every pipeline rank of a fake world on the meta device, and this process's growth.

    Tensor-parallel ranks have equal counts. The growth is in bytes; other tests have used the process before.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megavit.model.transformer_block import transformer_config
    from megavit.model.vit import Stage, VisionTransformer
    from megavit.parallel.layout import ParallelLayout
    from megavit.parallel.stages import plan_stages, rank_stages

    config = compose([*IMAGENET, *overrides, f"parallel.tp={tp}", f"parallel.pp={pp}"])
    validate(config, tp * pp)
    # Reset the process's peak memory.
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = _memory_bytes("VmRSS")
    counts = []
    initialize = parallel_state.initialize_model_parallel
    # gloo of torch 2.11 refuses the fake store.
    parallel_state.initialize_model_parallel = partial(initialize, create_gloo_process_groups=False)
    for pp_rank in range(pp):
        dist.init_process_group("fake", store=FakeStore(), rank=pp_rank * tp, world_size=tp * pp)
        layout = ParallelLayout.create(config.parallel, timeout_s=60)
        stages = plan_stages(config.parallel, config.network_shape(num_classes=1000))
        mcore_config = transformer_config(config.model, config.parallel, layout, stages=stages, dtype=torch.bfloat16)
        with torch.device("meta"):
            chunk = VisionTransformer(
                config.model,
                mcore_config=mcore_config,
                layout=layout,
                stage=Stage(
                    rank_stages(stages, config.parallel, pp_rank)[0],
                    0,
                    config.parallel.recompute,
                    config.data.image_size,
                    config.data.channels,
                ),
                num_classes=1000,
            )
        split = full = 0
        for parameter in chunk.parameters():
            assert parameter.is_meta
            if getattr(parameter, "tensor_model_parallel", False):
                split += parameter.numel()
            else:
                full += parameter.numel()
        counts.append(split * tp + full)
        dist.destroy_process_group()
    parallel_state.initialize_model_parallel = initialize
    return [*counts, _memory_bytes("VmHWM") - before_bytes]


def _memory_bytes(what: str) -> int:
    """Return this process's current (VmRSS) or highest (VmHWM) memory."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.parametrize("model", MILLIONS)
def test_named_sizes_have_their_parameters(model):
    count, _ = run_ranks(parameters_per_rank, 1, [f"model={model}"], 1, 1)[0]
    assert count == arithmetic(model)
    assert round(count / 1e6, 1) == MILLIONS[model]


def test_nemos_vit_b16_has_87168232_parameters():
    count, _ = run_ranks(parameters_per_rank, 1, ["model=vit_b16", *NEMO], 1, 1)[0]
    assert count == arithmetic("vit_b16", *NEMO) == 87_168_232


def test_vit_G14_builds_over_32_ranks_without_its_memory(figure):
    *counts, grown_bytes = run_ranks(parameters_per_rank, 1, ["model=vit_G14"], 8, 4)[0]
    figure(f"ViT-G/14 over TP 8 × PP 4: {sum(counts):,} parameters, {grown_bytes / 2**30:.2f} GiB of host memory more")
    assert sum(counts) == arithmetic("vit_G14")
    assert grown_bytes < 2**30
