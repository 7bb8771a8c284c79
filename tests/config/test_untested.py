"""Settings that have not been verified on a GPU: listed, documented, named in a line by a run on a GPU (faked here)."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_step
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.settings import flatten, run_types
from megavit.config.untested import UNTESTED, list_untested, untested
from megavit.config.validate import validate
from megavit.errors import ConfigError
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.trained import refusal, run_command

# Each setting in a run that it fits, and the ranks that this takes.
BF16 = ["train.precision=bf16_o2"]
VPP = ["parallel.pp=2", "parallel.vpp=2"]
FITS = {
    "model.attention_backend=sdpa_flash": (1, BF16),
    "model.attention_backend=flash_attn": (1, BF16),
    "model.attention_backend=te": (1, []),
    "model.linear_backend=fp8": (1, BF16),
    "model.linear_backend=te": (1, []),
    "optim.implementation=apex": (1, []),
    "optim.implementation=te": (1, []),
    "train.compile=layer": (1, []),
    "train.grad_reduce=bf16": (1, BF16),
    "train.gradient_accumulation_fusion=true": (1, []),
    "parallel.sequence_parallel=true": (2, ["parallel.tp=2", "model.class_tokens=8"]),
    "parallel.recompute=selective": (1, []),
    "parallel.recompute=full": (1, []),
    "parallel.overlap_grad_reduce=true": (2, []),
    "parallel.overlap_param_gather=true": (2, ["parallel.overlap_grad_reduce=true"]),
    "parallel.overlap_p2p=true": (2, VPP),
}
CUDA_ONLY = {
    **{
        f"model.attention_backend={name}": f"model.attention_backend={name} runs on CUDA only and this run is on cpu"
        for name in ("sdpa_flash", "flash_attn", "te")
    },
    "model.linear_backend=te": "model.linear_backend=te needs Transformer Engine",
    "optim.implementation=apex": "optim.implementation=apex is not installed",
    "optim.implementation=te": "optim.implementation=te is not installed",
}


def settings_of(option: str) -> tuple[int, list[str]]:
    world, fitting = FITS[option]
    return world, [*SMALL, *fitting, option]


def test_every_setting_of_the_list_exists_and_is_tested_here():
    assert set(UNTESTED) <= set(run_types())
    listed = {
        f"{line.partition('=')[0]}={value}" for line in list_untested() for value in line.split("=")[1].split("|")
    }
    assert listed == set(FITS)


@pytest.mark.parametrize("option", FITS)
def test_it_is_accepted_and_named_on_a_gpu_alone(option):
    world, settings = settings_of(option)
    config = compose(settings)
    validate(config, world)
    assert option in untested(flatten(config), device="cuda")
    assert untested(flatten(config), device="cpu") == []


def test_the_recipes_use_nothing_unverified():
    for recipe in ("digits", "digits_mae", "cifar10", "nemo_vit_b16", "mae_h14_800ep", "deit3_b16", "mae_b16_probe"):
        assert untested(flatten(compose([f"recipe={recipe}"])), device="cuda") == []


@pytest.mark.parametrize("option", CUDA_ONLY)
def test_on_the_cpu_the_message_is_that_cuda_is_missing(option, tmp_path):
    _, settings = settings_of(option)
    assert CUDA_ONLY[option] in refusal("train", *settings, "run.ranks=1", f"run.dir={tmp_path}")


@pytest.mark.parametrize("typed", ["experimental=true", "experimental=false", "+experimental=true", "~experimental"])
def test_experimental_is_answered_in_a_line(typed, tmp_path):
    output = refusal("train", *SMALL, typed, f"run.dir={tmp_path / 'run'}")
    assert output == (
        "megavit: experimental is no longer needed: a run on a GPU names the settings that have not been verified "
        "there, and continues; remove it\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_old_run_yaml_with_experimental_loads_and_another_unknown_key_does_not():
    config = compose(SMALL)
    for value in ("true", "false"):
        assert from_yaml(f"{to_yaml(config)}experimental: {value}\n") == config
    with pytest.raises(ConfigError, match="experimentall"):
        from_yaml(f"{to_yaml(config)}experimentall: true\n")


def test_a_trained_run_opens_without_its_unverified_settings(tmp_path):
    from megavit.inference.trained_run import read_config

    for option in FITS:
        _, settings = settings_of(option)
        (tmp_path / "run.yaml").write_text(to_yaml(compose(settings)))
        config = read_config(tmp_path)
        validate(config, 1)
        assert untested(flatten(config), device="cuda") == []


def test_the_summary_names_them_in_one_line():
    lines = run_ranks(_describe, 1, ["model.attention_backend=sdpa_flash", *BF16, "parallel.recompute=full"])[0]
    (line,) = [line for line in lines["cuda"] if "not verified" in line]
    assert line == "not verified on a GPU yet: model.attention_backend=sdpa_flash, parallel.recompute=full"
    assert not [line for line in lines["cpu"] if "not verified" in line]


def _describe(options: list[str]) -> dict[str, list[str]]:
    """Return a run's summary on both devices, from a network without the kernel that the CPU lacks."""
    from megavit.data.sources.open import open_splits
    from megavit.parallel.layout import ParallelLayout
    from megavit.train.setup import build_model
    from megavit.train.summary import describe_run

    config = compose([*SMALL, *options])
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    other = compose([*SMALL, *BF16])
    network = build_model(other, layout, resolve_step(other, 1, num_classes=10))
    layouts = {name: replace(layout, device=torch.device(name)) for name in ("cpu", "cuda")}
    training, validation = open_splits(config.data)
    sources = {"train": training, "val": validation}
    return {
        name: list(describe_run(config, place, network, sources=sources, from_scratch=True))[-2:]
        for name, place in layouts.items()
    }


@pytest.mark.parametrize("key", UNTESTED)
def test_its_docstring_says_that_it_has_not_been_run(key):
    group, _, name = key.partition(".")
    output = inspect.getdoc(type(getattr(ExperimentConfig(), group)))
    (own,) = re.findall(rf"^    {name}: (.*?)(?=^    \w+: |\Z)", output, flags=re.MULTILINE | re.DOTALL)
    _, marked, values = " ".join(own.split()).partition("Not run on a GPU")
    assert marked
    choices = [option.partition("=")[2] for option in FITS if option.startswith(f"{key}=")]
    assert choices == ["true"] or values == f": {', '.join(choices)}."


def test_help_and_the_status_page_list_them():
    _, usage, _ = run_command("--help")
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    for option in list_untested():
        assert f"  {option}\n" in usage
        assert f"`{option}`" in page
