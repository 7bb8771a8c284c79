"""What only a GPU can show, on one: `make test-gpu`. The process itself is the only rank."""

import os
import subprocess
import sys

import pytest
import torch

from tests.reference import SMALL, train_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("MEGAVIT_DEVICE") == "cpu", reason="MEGAVIT_DEVICE=cpu; run make test-gpu"),
]

LAYER = ["model.hidden_size=1024", "model.ffn_size=4096", "model.num_heads=16", "model.num_layers=4"]
BF16 = ["train.precision=bf16_o2"]


def on_gpu(function: str, *overrides: str) -> str:
    """Run a function of this file in a process of its own: Megatron-Core's state does not outlive a test."""
    code = f"from tests.gpu.test_cuda import {function}; {function}({list(overrides)!r})"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def ten_steps(overrides: list[str]) -> None:
    from tests import ranks

    torch.backends.cuda.matmul.allow_tf32 = False
    result = ranks.train(overrides)
    print("LOSSES", *result["losses"])


def losses_of(output: str) -> list[float]:
    (line,) = [line for line in output.splitlines() if line.startswith("LOSSES")]
    return [float(word) for word in line.split()[1:]]


def test_ten_steps_on_the_gpu_equal_plain_torch_on_the_cpu(tmp_path, figure):
    got = losses_of(on_gpu("ten_steps", *SMALL, f"run.dir={tmp_path}"))
    worst = max(abs(a - b) for a, b in zip(got, train_torch(SMALL).losses, strict=True))
    figure(f"one GPU, fp32: largest |Δloss| {worst:.1e} against plain torch on the CPU, 10 steps")
    assert worst <= 1e-5


def test_bf16_products_into_fp32_gradients_are_those_that_are_rounded_and_added(tmp_path, figure):
    """Four micro batches a step: without the option each one's product is rounded to bf16 first."""
    fused = ["train.gradient_accumulation_fusion=true"]
    got = losses_of(on_gpu("ten_steps", *SMALL, *BF16, *fused, f"run.dir={tmp_path}/fused"))
    want = losses_of(on_gpu("ten_steps", *SMALL, *BF16, f"run.dir={tmp_path}/rounded"))
    worst = max(abs(a - b) for a, b in zip(got, want, strict=True))
    figure(f"one GPU, bf16 O2, fused accumulation: largest |Δloss| {worst:.1e}, 10 steps")
    assert got[0] == want[0]
    assert worst <= 5e-3


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_flash", "flash_attn"])
def test_a_kernel_agrees_with_attention_in_fp32(attention):
    if attention == "flash_attn":
        pytest.importorskip("flash_attn")
    on_gpu("compare_kernel", f"model.attention_backend={attention}", *BF16, *LAYER, "model.class_tokens=1")


def compare_kernel(overrides: list[str]) -> None:
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.model.layers.attention_backends import attention_kernel
    from megavit.model.transformer_block import transformer_config
    from megavit.parallel.layout import ParallelLayout

    config = compose(overrides)
    validate(config, 1)
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    mcore_config = transformer_config(config.model, config.parallel, layout, stages=[4], dtype=torch.bfloat16)
    kernel = attention_kernel(config.model.attention_backend, mcore_config, layout.groups, device=layout.device)
    q, k, v = (torch.randn(8, 16, 197, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    scores = (q.float() @ k.float().transpose(-1, -2) / 8).softmax(-1)
    # bf16 keeps 8 bits: values of order 1 differ by 4e-3.
    assert (kernel(q, k, v, 0.0).float() - scores @ v.float()).abs().max() < 2e-2


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit products on this GPU"
)
@pytest.mark.parametrize("rows", [197, 3 * 197, 16 * 197])
def test_products_in_fp8_are_those_of_the_cpu(rows, figure):
    worst = on_gpu("compare_eight_bit_products", str(rows)).split()[-1]
    figure(f"one GPU, FP8 products of {rows} rows: {float(worst):.1e} from the CPU's (norm)")
    # Not run yet. The same 8-bit numbers are multiplied; sums and bf16 round otherwise, 2.4e-3 at most.
    assert float(worst) <= 3e-3


def compare_eight_bit_products(arguments: list[str]) -> None:
    from megavit.model.layers.linear_fp8 import require_fp8
    from tests.model.layers.test_linear_fp8 import by_fp8, operands, with_gradients

    require_fp8(torch.device("cuda"))
    tensors = operands(int(arguments[0]), 768, 3072)
    here, there = with_gradients(by_fp8, *tensors), with_gradients(by_fp8, *(tensor.cuda() for tensor in tensors))
    print(max(float((a - b.cpu()).norm() / a.norm()) for a, b in zip(here, there, strict=True)))


def test_a_step_waits_for_the_device_once(tmp_path):
    on_gpu("count_synchronisations", *SMALL, "metrics.log_every=100", f"run.dir={tmp_path}")


def count_synchronisations(overrides: list[str]) -> None:
    import warnings

    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    trainer = Trainer(compose(overrides), evaluates=False, saves=False)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run()
    waits = [str(warning.filename) for warning in caught if "synchroniz" in str(warning.message)]
    # Ten steps' norms, and the report at the end.
    assert len(waits) <= 12, waits


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_peak_memory_of_the_layers_follows_the_formula(recompute, figure):
    options = [f"parallel.recompute={recompute}", "model.attention_backend=sdpa_flash"]
    output = on_gpu("peak_memory", *LAYER, *BF16, *options)
    measured, formula = map(float, output.split()[-2:])
    figure(
        f"one GPU, {recompute} recompute: {measured / 2**20:.1f} MiB kept by 4 layers, formula {formula / 2**20:.1f}"
    )
    assert measured == pytest.approx(formula, rel=0.05)


def peak_memory(overrides: list[str]) -> None:
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.model.init import initialise
    from megavit.model.transformer_block import transformer_config
    from megavit.model.vit import Stage, VisionTransformer
    from megavit.parallel.layout import ParallelLayout
    from megavit.parallel.rng import seed_step

    config = compose(overrides)
    validate(config, 1)
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    mcore_config = transformer_config(config.model, config.parallel, layout, stages=[4], dtype=torch.bfloat16)
    chunk = VisionTransformer(
        config.model,
        mcore_config=mcore_config,
        layout=layout,
        stage=Stage(4, 0, config.parallel.recompute, [8, 8], 1),
        num_classes=10,
    )
    initialise(chunk, config.model, layout, seed=0)
    chunk.to(layout.device)
    seed_step(layout, seed=0, step=0)
    n, b, h, f = 256, 32, 1024, 4096
    tokens = torch.randn(n, b, h, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    kept = chunk.blocks(tokens, None)
    torch.cuda.synchronize()
    measured = torch.cuda.memory_allocated() - before
    per_token = {"none": 16 + 4 * f / h, "selective": 12, "full": 2}[config.parallel.recompute.value]
    # The block's input lives outside; its last layer's output and the final norm's stand in for it.
    print(measured, 4 * n * b * h * per_token + 2 * n * b * h)
    del kept


def test_masks_are_the_same_on_cpu_and_gpu():
    from megavit.task.masking import random_keep

    ids = torch.arange(4096)
    epochs, occurrences = ids % 3, ids % 2
    want = random_keep(ids, epochs, occurrences, 196, num_kept=49, seed=5)
    got = random_keep(ids.cuda(), epochs.cuda(), occurrences.cuda(), 196, num_kept=49, seed=5)
    assert torch.equal(got.cpu(), want)
