"""Define the benchmark's cases: network, settings, batch size and candidates of each."""

from dataclasses import dataclass

# Settings that every candidate supports: no dropout, no drop path, no erasing or mixing; AdamW and clipping as in the
# recipes. The learning rate only has to move the weights, which the parity check compares.
_COMMON = (
    "recipe=null",
    "data=synthetic",
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
    "model.drop_path=0",
    "optim.lr=1e-4",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "optim.weight_decay=0.05",
    "optim.clip_grad=1.0",
    "train.steps=1000000",
)
_CLASSIFY = ("task=classify", "task.label_smoothing=0")
_MAE = (
    "task=mae",
    "model.positions=sincos",
    "task.baseline_samples=1",
    "task.decoder_hidden_size=512",
    "task.decoder_ffn_size=2048",
    "task.decoder_num_heads=16",
    "task.decoder_num_layers=8",
)

# megavit's own candidates by name, with their settings in addition to the row's.
OWN = {
    "megavit": (),
    "megavit+compile": ("train.compile=layer",),
    "megavit+onednn": ("model.linear_backend=onednn",),
    "megavit+onednn+compile": ("model.linear_backend=onednn", "train.compile=layer"),
}
CLASSIFIERS = (*OWN, "timm", "timm+compile", "hf", "hf+compile", "plain")
AUTOENCODERS = (*OWN, "hf", "hf+compile", "plain")


@dataclass(frozen=True)
class BenchmarkCase:
    """One case of the benchmark.

    Attributes:
        overrides: settings of megavit's run.
        cpu_batch: images per step on a CPU.
        gpu_batch: images per step on a GPU of 80 GB.
        candidates: names of the candidates; the first is the reference.
    """

    overrides: tuple[str, ...]
    cpu_batch: int
    gpu_batch: int
    candidates: tuple[str, ...]


def _classifier(model: str, gpu_batch: int, *more: str) -> BenchmarkCase:
    return BenchmarkCase((f"model={model}", *_CLASSIFY, *more), 8, gpu_batch, CLASSIFIERS)


def _autoencoder(model: str, gpu_batch: int) -> BenchmarkCase:
    return BenchmarkCase((f"model={model}", *_MAE), 8, gpu_batch, AUTOENCODERS)


ROWS = {
    "vit_b16": _classifier("vit_b16", 256),
    "vit_l16": _classifier("vit_l16", 128),
    "vit_h14": _classifier("vit_h14", 64),
    # With 264 tokens, as in NVIDIA's published figure.
    "vit_g14": _classifier("vit_g14", 48, "model.class_tokens=8"),
    "vit_G14": _classifier("vit_G14", 24),
    "mae_b16": _autoencoder("vit_b16", 256),
    "mae_l16": _autoencoder("vit_l16", 192),
    "mae_h14": _autoencoder("vit_h14", 96),
    # Two processes of one thread each, compared with one process of two threads.
    "tp2": BenchmarkCase(
        ("model=vit_b16", *_CLASSIFY), 8, 256, ("megavit", "megavit tp2", "megavit+onednn", "megavit+onednn tp2")
    ),
    # The time that the trainer's loop adds to its steps, which is a larger fraction of the shorter bf16 steps.
    "loop": BenchmarkCase(("model=vit_b16", *_CLASSIFY), 8, 256, ("megavit", "trainer")),
}
ON_CPU = ("vit_b16:fp32", "vit_b16:bf16", "mae_b16:fp32", "mae_b16:bf16", "tp2:fp32", "loop:bf16")
ON_GPU = tuple(f"{name}:bf16" for name in ROWS if name != "tp2")
TP2 = "parallel.tp=2"
# The end of a candidate's name if it runs on two ranks.
ON_TWO = " tp2"
PRECISIONS = {"fp32": "fp32", "bf16": "bf16_o2"}


def overrides_of(row: BenchmarkCase, precision: str, batch: int) -> list[str]:
    """Return the settings of a row as a run's overrides."""
    return [
        *_COMMON,
        *row.overrides,
        f"train.precision={PRECISIONS[precision]}",
        f"train.global_batch={batch}",
        f"train.micro_batch={batch}",
    ]
