"""`model=auto`: the network of the weights that init_from names, for a run, its resume, its ranks and a job."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import save_for_hf

from megavit.cluster.job import plan_job
from megavit.cluster.registry import get_backend
from megavit.config.compose import compose
from megavit.errors import ConfigError
from megavit.model.config import Pool, Positions
from megavit.train.auto_model import resolve_auto
from tests.reference import SMALL
from tests.test_mae_parity import MAE
from tests.trained import refusal, run_command, train_small

SIZES = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=8, mlp_ratio=2)
# What SMALL says of the network is what model=auto is to find.
RUN = [text for text in SMALL if not text.startswith("model.") or "drop_path" in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "weights"
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **SIZES), path, safe_serialization=True)
    return path


def test_the_weights_give_the_sizes_and_what_is_typed_stays(folder):
    typed = [*RUN, "model=auto", "model.drop_path=0.2", f"init_from=timm:{folder}"]
    resolved, taken = resolve_auto(typed)
    model = compose(resolved).model
    assert (model.hidden_size, model.ffn_size, model.num_heads, model.num_layers) == (32, 64, 8, 2)
    assert (model.patch_size, model.drop_path, model.pool) == (2, 0.2, Pool.cls)
    assert f"model=auto, from timm:{folder}: model.hidden_size=32 model.ffn_size=64 model.num_heads=8" in taken
    assert resolve_auto(["model=vit_b16"]) == (["model=vit_b16"], None)
    assert compose(resolve_auto([*typed, "model.norm_eps=1e-5"])[0]).model.norm_eps == 1e-5


def test_a_run_of_ones_own_gives_them_too_with_its_decoder_for_an_autoencoder(tmp_path):
    run = train_small(tmp_path / "run", *MAE, "train.steps=1", "optim.warmup_steps=0")
    settings = ["model=auto", f"init_from={run}"]
    again = compose(resolve_auto([*MAE, *RUN, *settings])[0])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert again.task.decoder_num_heads == saved["task"]["decoder_num_heads"]
    assert again.model.positions is Positions.sincos
    tuned = compose(resolve_auto([*RUN, *settings, "model.pool=mean"])[0]).model
    # Fine-tuning learns positions that start from the fixed ones.
    assert (tuned.num_layers, tuned.pool, tuned.positions) == (2, Pool.mean, Positions.learned)


def test_without_weights_it_is_refused_and_other_verbs_say_whose_it_is(folder):
    with pytest.raises(ConfigError, match="model=auto takes the network of the weights that init_from names"):
        resolve_auto(["model=auto"])
    assert "nowhere is not a file" in refusal("train", "model=auto", "init_from=timm:nowhere")
    assert "model=auto is for megavit train and megavit submit" in refusal("show-data", "model=auto", "out=x.png")


def test_a_run_holds_concrete_sizes_and_resumes_when_the_weights_are_gone(folder, tmp_path):
    own = tmp_path / "weights"
    shutil.copytree(folder, own)
    keys = [*RUN, "model=auto", f"init_from=timm:{own}", f"run.dir={tmp_path / 'run'}", "train.steps=4"]
    code, output, err = run_command("train", *keys, "train.stop_at=2")
    assert code in (0, 75), err
    assert output.count("model=auto, from timm:") == 1
    # The classifier is of as many classes, and stays.
    assert "initialised from scratch" not in output
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["model"]["num_heads"], saved["model"]["hidden_size"]) == (8, 32)
    shutil.rmtree(own)
    code, output, err = run_command("train", *keys, "model.drop_path=0.1")
    assert code == 0, err
    assert "complete: step 4 of 4" in output


def resolve(typed: list[str]) -> list[str]:
    return resolve_auto(typed)[0]


def test_a_job_gets_sizes_that_were_read_at_the_desk(folder, tmp_path):
    backend = get_backend(["cluster=local"])
    job = plan_job(
        [*RUN, "model=auto", f"init_from=timm:{folder}", f"run.dir={tmp_path}"], backend.config, resolve=resolve
    )
    assert "model=auto" not in job.overrides
    assert "model.num_heads=8" in job.overrides
    assert job.config.model.num_heads == 8


@pytest.mark.slow
def test_two_ranks_train_the_same_network(folder, tmp_path):
    keys = [*RUN, "model=auto", f"init_from=timm:{folder}", f"run.dir={tmp_path / 'run'}", "train.steps=4"]
    code, output, err = run_command("train", *keys, "run.ranks=2", "parallel.tp=2")
    assert code == 0, err
    assert output.count("model=auto, from timm:") == 1
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()


def test_so400ms_heads_of_72_are_known(tmp_path):
    weights = timm.create_model("vit_tiny_patch16_224", **{**SIZES, "embed_dim": 1152, "depth": 1}).state_dict()
    layer = {name: weight for name, weight in weights.items() if name.startswith("blocks.0.")}
    more = {
        name.replace("blocks.0.", f"blocks.{n}."): weight[:1] for n in range(1, 27) for name, weight in layer.items()
    }
    save_file({**weights, **{name: torch.clone(weight) for name, weight in more.items()}}, tmp_path / "a.safetensors")
    resolved, _ = resolve_auto(["model=auto", f"init_from=timm:{tmp_path / 'a.safetensors'}"])
    assert "model.num_heads=16" in resolved
