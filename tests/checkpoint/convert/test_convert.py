"""Test conversions from and to timm, Hugging Face and MAE: bit-equal round trips, and the library's logits."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cli.test_mistakes import main_here
from tests.distributed import run_ranks

SIZES = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5)
TIMM = {
    "as it is": {},
    "mean pooling": dict(global_pool="avg", fc_norm=True),
    "layer scale, qk-norm": dict(init_values=0.1, qk_norm=True),
    "registers": dict(reg_tokens=4, no_embed_class=True, img_size=40),
    "registers, no class token, mean pooling": dict(
        reg_tokens=4, no_embed_class=True, class_token=False, global_pool="avg", fc_norm=True
    ),
    "no class token": dict(class_token=False, global_pool="avg", fc_norm=True),
    "no positions of the class token": dict(no_embed_class=True),
}
HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=24, patch_size=8)


def megavit(*arguments: str) -> None:
    code, output = run_ranks(main_here, 1, list(arguments))[0]
    assert code == 0, output


def refused(*arguments: str) -> str:
    code, output = run_ranks(main_here, 1, list(arguments))[0]
    assert code == 2, output
    assert output.count("megavit: ") == 1
    assert "Traceback" not in output
    return output


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def logits_at(run_dir: str, images: torch.Tensor) -> torch.Tensor | None:
    """Return a converted run's scores of normalised images, tensor-parallel over all ranks."""
    from dataclasses import replace

    from megavit.checkpoint.find import find_checkpoint
    from megavit.checkpoint.shards import load_weights
    from megavit.config.resolved import resolve_step
    from megavit.inference.trained_run import read_config
    from megavit.parallel.config import ParallelConfig
    from megavit.parallel.layout import ParallelLayout, world_size_from_environment
    from megavit.train.setup import build_model

    checkpoint = find_checkpoint(Path(run_dir))
    config = replace(read_config(checkpoint), parallel=ParallelConfig(tp=world_size_from_environment()))
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    classes = json.loads((checkpoint / "state.json").read_text())["classes"]
    network = build_model(config, layout, resolve_step(config, layout.world_size, num_classes=len(classes)))
    load_weights(checkpoint, network.chunks)
    (chunk,) = network.chunks.values()
    with torch.no_grad():
        return chunk.eval()(images)


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all weights, so that none keeps an initial value such as zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def assert_same_logits(run_dir: Path, images: torch.Tensor, want: torch.Tensor, figure, name: str, heads: int) -> None:
    for ranks in (1, 2) if heads % 2 == 0 else (1,):
        got = run_ranks(logits_at, ranks, str(run_dir), images)[0]
        difference = float((got - want).abs().max())
        figure(f"{name}, TP {ranks}: largest |Δlogit| {difference:.1e}")
        # Measured: 1.2e-6.
        assert difference <= 1e-5


SLOW = ("mean pooling", "no positions of the class token", "no class token", "registers, no class token, mean pooling")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow if v in SLOW else ()) for v in TIMM])
def test_timms_weights_come_back_to_the_bit_and_give_the_same_logits(variant, tmp_path, figure):
    theirs = shake(timm.models.VisionTransformer(**{**SIZES, "num_heads": 2, **TIMM[variant]}))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    megavit("convert", f"from=timm:{tmp_path / 'model.safetensors'}", f"to={tmp_path / 'run'}", "num_heads=2")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=timm:{tmp_path / 'back.safetensors'}")
    assert_same(load_file(tmp_path / "back.safetensors"), theirs.state_dict())
    side = TIMM[variant].get("img_size", 32)
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(images)
    assert_same_logits(tmp_path / "run", images, want, figure, f"timm, {variant}", heads=2)


def test_timm_opens_the_file_by_create_model(tmp_path):
    theirs = shake(timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "model.pth")
    megavit("convert", f"from=timm:{tmp_path / 'model.pth'}", f"to={tmp_path / 'run'}")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=timm:{tmp_path / 'back.safetensors'}")
    opened = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=64, checkpoint_path=str(tmp_path / "back.safetensors")
    )
    assert_same(opened.state_dict(), theirs.state_dict())


def test_hugging_faces_classifier_comes_back_to_the_bit_and_gives_the_same_logits(tmp_path, figure):
    config = transformers.ViTConfig(**HF, id2label={0: "ant", 1: "bee", 2: "cat"})
    theirs = shake(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    megavit("convert", f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=hf:{tmp_path / 'back'}")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors"))
    opened = transformers.ViTForImageClassification.from_pretrained(tmp_path / "back")
    assert_same(opened.state_dict(), theirs.state_dict())
    assert opened.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert opened.config.layer_norm_eps == theirs.config.layer_norm_eps
    kept = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert (kept["image_mean"], kept["size"]) == ([0.1, 0.2, 0.3], {"height": 24, "width": 24})
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")
    assert list(processor.image_std) == [1, 2, 3]
    assert (tmp_path / "back" / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(images).logits
    assert_same_logits(tmp_path / "run", images, want, figure, "Hugging Face's ViT", heads=4)


def test_hugging_faces_model_without_a_head_gives_the_same_tokens(tmp_path):
    theirs = shake(transformers.ViTModel(transformers.ViTConfig(**HF)))
    theirs.save_pretrained(tmp_path / "hf")
    megavit("convert", f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(images).last_hidden_state
    assert float((run_ranks(tokens_of, 1, str(tmp_path / "run"), images)[0] - want).abs().max()) <= 1e-5


def tokens_of(run_dir: str, images: torch.Tensor) -> torch.Tensor:
    import megavit

    with torch.no_grad():
        return megavit.load(run_dir).vit.tokens(images)


def mae_model() -> torch.nn.Module:
    sizes = dict(
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=40,
    )
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HF, **sizes, norm_pix_loss=True))
    from megavit.model.layers.pos_embed import sincos_positions

    with torch.no_grad():
        # transformers 5.23 initialises both with zeros.
        model.vit.embeddings.position_embeddings[0] = sincos_positions((3, 3), 48, class_tokens=1)
        model.decoder.decoder_pos_embed[0] = sincos_positions((3, 3), 32, class_tokens=1)
    return shake(model)


def test_hugging_faces_autoencoder_comes_back_to_the_bit(tmp_path):
    theirs = mae_model()
    theirs.save_pretrained(tmp_path / "hf")
    megavit("convert", f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=hf:{tmp_path / 'back'}")
    opened = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "back")
    assert_same(opened.state_dict(), theirs.state_dict())
    assert opened.config.norm_pix_loss is True


def test_maes_own_file_comes_back_to_the_bit_and_its_encoder_goes_to_timm(tmp_path):
    theirs = mae_model()
    theirs.save_pretrained(tmp_path / "hf")
    megavit("convert", f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'run'}")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=mae:{tmp_path / 'mae.pth'}")
    first = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    assert first.keys() >= {
        "cls_token",
        "pos_embed",
        "decoder_pos_embed",
        "decoder_blocks.1.attn.qkv.weight",
        "norm.bias",
    }
    import argparse

    # Its training script saves the arguments with the weights.
    torch.save({"model": first, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "trained.pth")
    megavit("convert", f"from=mae:{tmp_path / 'trained.pth'}", f"to={tmp_path / 'again'}", "num_heads=4")
    megavit("convert", f"from={tmp_path / 'again'}", f"to=mae:{tmp_path / 'back.pth'}")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], first)
    megavit("convert", f"from={tmp_path / 'again'}", f"to=timm:{tmp_path / 'encoder.safetensors'}")
    encoder = timm.models.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=4, mlp_ratio=80 / 48, num_classes=0
    )
    encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)


def push_to_a_stand_in(arguments: list[str]) -> tuple[int, str, list]:
    import huggingface_hub

    calls: list[tuple] = []

    class Hub:
        def create_repo(self, repository, *, private, exist_ok):
            calls.append((repository, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    real, huggingface_hub.HfApi = huggingface_hub.HfApi, Hub
    try:
        return (*main_here(arguments), calls)
    finally:
        huggingface_hub.HfApi = real


def push_without_a_network(arguments: list[str]) -> tuple[int, str]:
    import functools

    import huggingface_hub

    real = huggingface_hub.HfApi
    huggingface_hub.HfApi = functools.partial(real, endpoint="http://localhost:9", token="hf_none")
    try:
        return main_here(arguments)
    finally:
        huggingface_hub.HfApi = real


def test_a_push_goes_to_a_private_repository_and_a_failed_one_leaves_the_folder_complete(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict(), tmp_path / "timm.safetensors")
    megavit("convert", f"from=timm:{tmp_path / 'timm.safetensors'}", f"to={tmp_path / 'run'}")
    out = ["convert", f"from={tmp_path / 'run'}", f"to=hf:{tmp_path / 'hf'}", "push=me/mine"]
    code, output, calls = run_ranks(push_to_a_stand_in, 1, out)[0]
    assert (code, calls) == (
        0,
        [
            ("me/mine", True, True),
            ("me/mine", ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]),
        ],
    ), output
    out[2] = f"to=hf:{tmp_path / 'again'}"
    code, output = run_ranks(push_without_a_network, 1, out)[0]
    assert code == 2, output
    assert output.count("megavit: push=me/mine: the Hugging Face hub rejects it: ") == 1
    assert (tmp_path / "again" / "model.safetensors").exists()
    assert "push=mine must be ORG/NAME" in refused(*out[:3], "push=mine")


def peak_memory(*arguments: str) -> int:
    """Return the peak of a conversion's anonymous memory in bytes; mapped files belong to the page cache."""
    command = [sys.executable, "-m", "megavit", "convert", *arguments]
    running = subprocess.Popen(command, env={**os.environ, "MEGAVIT_DEVICE": "cpu"}, stdout=subprocess.DEVNULL)
    peak = 0
    while running.poll() is None:
        with contextlib.suppress(OSError, AttributeError, ProcessLookupError):
            status = Path(f"/proc/{running.pid}/status").read_text()
            peak = max(peak, int(re.search(r"RssAnon:\s+(\d+)", status).group(1)) * 1024)
        time.sleep(0.01)
    return peak


@pytest.mark.slow
def test_a_conversion_holds_less_than_half_more_than_the_model(tmp_path, figure):
    theirs = tmp_path / "timm.safetensors"
    save_file(timm.create_model("vit_large_patch16_224").state_dict(), theirs)
    imports, size = peak_memory("from=nothing", "to=nothing"), theirs.stat().st_size
    for name, arguments in {
        "from timm": [f"from=timm:{theirs}", f"to={tmp_path / 'run'}"],
        "to timm": [f"from={tmp_path / 'run'}", f"to=timm:{tmp_path / 'back.safetensors'}"],
        "to Hugging Face": [f"from={tmp_path / 'run'}", f"to=hf:{tmp_path / 'hf'}"],
        "from Hugging Face": [f"from=hf:{tmp_path / 'hf'}", f"to={tmp_path / 'again'}"],
    }.items():
        ratio = (peak_memory(*arguments) - imports) / size
        figure(f"ViT-L/16 {name}: {ratio:.2f} times its size")
        assert ratio < 1.5


def test_dtype_bf16_writes_half_precision(tmp_path):
    theirs = shake(timm.models.VisionTransformer(**SIZES))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    megavit("convert", f"from=timm:{tmp_path / 'model.safetensors'}", f"to={tmp_path / 'run'}")
    megavit("convert", f"from={tmp_path / 'run'}", f"to=timm:{tmp_path / 'half.safetensors'}", "dtype=bf16")
    half = load_file(tmp_path / "half.safetensors")
    assert_same(half, {name: weight.bfloat16() for name, weight in theirs.state_dict().items()})


def test_what_does_not_fit_is_refused_with_the_first_weight_that_differs(tmp_path):
    weights = shake(timm.models.VisionTransformer(**SIZES)).state_dict()

    def output(changed: dict[str, torch.Tensor | None], *more: str) -> str:
        file = tmp_path / "wrong.safetensors"
        save_file({name: w for name, w in {**weights, **changed}.items() if w is not None}, file)
        return refused("convert", f"from=timm:{file}", f"to={tmp_path / 'never'}", *more)

    assert "blocks.1.mlp.fc2.weight has shape [64, 9], and the model's sizes need [64, 256]" in output(
        {"blocks.1.mlp.fc2.weight": torch.ones(64, 9)}
    )
    assert "no weight 'blocks.1.norm1.bias'" in output({"blocks.1.norm1.bias": None})
    assert "megavit's network has no weight for norm_pre.weight" in output({"norm_pre.weight": torch.ones(64)})
    assert "has no pos_embed" in output({"pos_embed": None})
    assert "is not a ViT with timm's names" in output({"patch_embed.proj.weight": None})
    assert "is not divisible by model.num_heads=7" in output({}, "num_heads=7")
    assert not (tmp_path / "never" / "checkpoints").exists()


def test_wrong_arguments_and_strange_files_are_refused_in_one_line(tmp_path):
    run, out = f"to={tmp_path / 'run'}", f"to=timm:{tmp_path / 'x.safetensors'}"
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save({"model": print}, tmp_path / "code.pth")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for arguments, message in (
        (["from=runs/a", "to=runs/b"], "takes one run and one of hf:PATH"),
        (["from=timm:a", "to=hf:b"], "takes one run and one of hf:PATH"),
        ([f"from=timm:{tmp_path / 'nowhere.safetensors'}", run], "is not a file"),
        ([f"from=timm:{tmp_path / 'torn.safetensors'}", run], "cannot be read as weights"),
        ([f"from=mae:{tmp_path / 'code.pth'}", run], "cannot be read as weights"),
        ([f"from=hf:{tmp_path}", run], "is a bert; vit and vit_mae can be converted"),
        ([f"from={tmp_path}", out], "holds no checkpoint"),
        ([f"from=timm:{tmp_path}", run, "dtype=bf16"], "dtype=bf16 would be ignored"),
        ([f"from={tmp_path}", out, "dtype=int8"], "dtype=int8 is not known; known: fp32, bf16, fp16"),
    ):
        assert message in refused("convert", *arguments)


def load_pretrained(overrides: list[str]) -> dict:
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    validate(config, world_size_from_environment())
    trainer = Trainer(config)
    before = {
        name: value.detach().clone()
        for chunk in trainer.chunks.values()
        for name, value in chunk.state_dict().items()
        if value is not None
    }
    trainer.run()
    return {"before": before, "said": list(trainer.warnings), "step": trainer.step}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_starts_from_converted_weights_and_then_resumes_from_its_own(ranks, tmp_path):
    theirs = shake(
        timm.models.VisionTransformer(**{**SIZES, "in_chans": 1, "img_size": 8, "patch_size": 2, "num_heads": 2})
    )
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    megavit("convert", f"from=timm:{tmp_path / 'model.safetensors'}", f"to={tmp_path / 'run'}", "num_heads=2")
    keys = [
        "model.hidden_size=64", "model.ffn_size=256", "model.num_heads=2", "model.num_layers=2", "model.drop_path=0",
        f"parallel.tp={ranks}", "train.steps=3", "optim.warmup_steps=1", "train.precision=bf16_o2",
        "run.preflight=false",
        f"run.dir={tmp_path / 'tuned'}", f"init_from={tmp_path / 'run'}", "optim.ema=0.9",
    ]  # fmt: skip
    got = run_ranks(load_pretrained, ranks, keys)[0]
    assert got["step"] == 3
    resume_point = tmp_path / "run" / "checkpoints" / "step_00000000"
    assert got["said"] == [
        f"starts from the weights of {resume_point}; head.out.bias, head.out.weight initialised from scratch",
        "note: no file of these weights states data.mean, which is [0.305] here and often [0.5] elsewhere",
        "note: no file of these weights states data.std, which is [0.376] here and often [0.5] elsewhere",
    ]
    assert torch.equal(got["before"]["blocks.layers.1.norm2.bias"], theirs.blocks[1].norm2.bias.bfloat16())
    again = run_ranks(load_pretrained, ranks, [*keys, "train.steps=4"])[0]
    assert (again["step"], again["said"]) == (4, [])
    assert "holds converted weights and no optimizer state" in refused(
        "train", *keys, f"run.dir={tmp_path / 'run'}", "init_from=null", "run.ranks=1", "parallel.tp=1"
    )
    assert "does not fit this network: model.hidden_size is 64 in the weights and 32 here;" in refused(
        "train", *keys, f"run.dir={tmp_path / 'other'}", "model.hidden_size=32", "run.ranks=1", "parallel.tp=1"
    )
