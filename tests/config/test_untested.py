"""What has not been run on a GPU is marked, listed, and asks for `experimental=true` there; GPUs are faked here."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavit.config.compose import compose, to_yaml
from megavit.config.experiment import ExperimentConfig
from megavit.config.untested import UNTESTED, list_untested
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.parallel import cpu_backend as cpu
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.trained import refusal, run_command

# Each option in a run that it fits, and the ranks that this takes.
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
CUDA_ALONE = {
    **{
        f"model.attention_backend={name}": f"model.attention_backend={name} runs on CUDA alone and this run is on cpu"
        for name in ("sdpa_flash", "flash_attn", "te")
    },
    "model.linear_backend=te": "model.linear_backend=te needs Transformer Engine",
    "optim.implementation=apex": "optim.implementation=apex is not installed",
    "optim.implementation=te": "optim.implementation=te is not installed",
}
ON_BOTH = [option for option in FITS if option not in CUDA_ALONE]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(cpu, "run_on_cpu", lambda: False)


def settings_of(option: str) -> tuple[int, list[str]]:
    world, fitting = FITS[option]
    return world, [*SMALL, *fitting, option]


def test_every_option_of_the_list_is_tested_here():
    listed = {
        f"{line.partition('=')[0]}={value}" for line in list_untested() for value in line.split("=")[1].split("|")
    }
    assert listed == set(FITS)
    refused = {f"{key}={value.value}" for key, option in UNTESTED.items() for value in option.needs_cuda}
    assert set(CUDA_ALONE) == refused


@pytest.mark.parametrize("option", FITS)
def test_on_a_gpu_it_is_refused_and_the_way_out_named(option, on_gpu):
    world, settings = settings_of(option)
    with pytest.raises(ConfigError, match=rf"{option} (and .* have|has|have) not been run on a GPU yet") as refused:
        validate(compose(settings), world)
    # Set as the message says, the run is accepted: either way.
    output = str(refused.value)
    assert "\n" not in output
    assert "set experimental=true to try " in output
    validate(compose([*settings, "experimental=true"]), world)
    instead = re.findall(r"[\w.]+=\w+", output.partition(", or ")[2])
    assert instead
    validate(compose([*settings, *instead]), world)


def test_several_are_refused_in_one_message(on_gpu):
    with pytest.raises(ConfigError) as refused:
        validate(compose([*SMALL, "train.compile=layer", "parallel.recompute=full"]), 1)
    assert str(refused.value) == (
        "train.compile=layer and parallel.recompute=full have not been run on a GPU yet; set experimental=true to try "
        "them, or train.compile=none and parallel.recompute=none"
    )


def test_on_a_gpu_the_recipes_need_no_asking(on_gpu):
    for recipe in ("digits", "digits_mae", "cifar10", "nemo_vit_b16", "mae_h14_800ep", "deit3_b16", "mae_b16_probe"):
        validate(
            compose([f"recipe={recipe}", "data.path=/data"] if "digits" not in recipe else [f"recipe={recipe}"]), 1
        )


def test_what_contradicts_itself_is_told_before_it_is_asked_for(on_gpu):
    with pytest.raises(ConfigError, match=r"makes one graph of a layer, and parallel\.tp=2 breaks it"):
        validate(compose([*SMALL, "train.compile=layer", "parallel.tp=2"]), 2)


@pytest.mark.parametrize("option", ON_BOTH)
def test_on_the_cpu_what_has_been_run_there_needs_no_asking(option):
    world, settings = settings_of(option)
    validate(compose(settings), world)
    with pytest.raises(ConfigError, match="experimental=true would be ignored: this run is on the CPU"):
        validate(compose([*settings, "experimental=true"]), world)


@pytest.mark.parametrize("option", CUDA_ALONE)
def test_on_the_cpu_the_first_message_is_that_cuda_is_missing(option, tmp_path):
    world, settings = settings_of(option)
    # Unasked it goes as far as where it is built: of the messages there tests/train/test_engine.py, tests/optim/ and
    # tests/model/ have tests.
    validate(compose(settings), world)
    output = refusal("train", *settings, "experimental=true", "run.ranks=1", f"run.dir={tmp_path}")
    assert CUDA_ALONE[option] in output
    assert "has not been run on a GPU" not in output


def test_asking_for_nothing_is_refused(on_gpu):
    with pytest.raises(ConfigError, match="experimental=true would be ignored: every option that is set"):
        validate(compose([*SMALL, "experimental=true"]), 1)
    with pytest.raises(ConfigError, match="experimental=true would be ignored"):
        validate(compose([*SMALL, "experimental=true", "optim=sgd", "optim.lr=0.1"]), 1)


def test_the_device_may_be_another_machines():
    config = compose([*SMALL, "train.compile=layer"])
    validate(config, 1)
    with pytest.raises(ConfigError, match="has not been run on a GPU yet"):
        validate(config, 1, device="cuda")


@pytest.mark.parametrize(("name", "more"), [("train", []), ("bench", ["bench.rows=vit_b16:fp32"])])
def test_a_verb_on_a_gpu_machine_refuses_it_in_one_line(name, more, tmp_path):
    code, err = run_ranks(_on_gpu, 1, [name, *more, "train.compile=layer", f"run.dir={tmp_path / 'run'}"])[0]
    assert code == 2
    assert err.startswith("megavit: train.compile=layer has not been run on a GPU yet")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def _on_gpu(arguments: list[str]) -> tuple[int, str]:
    """A command line in a process that believes in a GPU."""
    from tests.trained import _verb

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "run_on_cpu", lambda: False)
        code, _, err = _verb([*arguments, "run.ranks=1"] if arguments[0] == "train" else arguments, None)
    return code, err


def test_to_look_at_a_run_asks_for_nothing(tmp_path):
    """What training asked for is not needed then, and is set back to what has no need to be asked for."""
    from megavit.inference.trained_run import read_config

    for option in FITS:
        world, settings = settings_of(option)
        config = compose([*settings, "experimental=true"])
        validate(config, world, device="cuda")
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        validate(read_config(tmp_path), 1, device="cuda")
        validate(read_config(tmp_path), 1, device="cpu")


def test_the_introduction_says_in_a_line_what_has_not_been_run():
    said = run_ranks(_introduced, 1, ["model.attention_backend=sdpa_flash", *BF16, "parallel.recompute=full"])[0]
    (line,) = [line for line in said["cuda"] if "not run" in line]
    assert line == "experimental, not run on a GPU before: model.attention_backend=sdpa_flash, parallel.recompute=full"
    assert not [line for line in said["cpu"] if "not run" in line]


def _introduced(options: list[str]) -> dict[str, list[str]]:
    """What a run with these options would say on a device, from a network without the kernel that the CPU lacks."""
    from megavit.data.sources.registry import open_splits
    from megavit.parallel.layout import ParallelLayout
    from megavit.train.setup import build_model
    from megavit.train.summary import describe_run

    config = compose([*SMALL, *options])
    layout = ParallelLayout.create(config.parallel, timeout_s=60)
    network = build_model(compose([*SMALL, *BF16]), layout, num_classes=10)
    places = {name: replace(layout, device=torch.device(name)) for name in ("cpu", "cuda")}
    training, validation = open_splits(config.data)
    sources = {"train": training, "val": validation}
    return {
        name: list(describe_run(config, place, network, sources=sources, from_scratch=True))[-2:]
        for name, place in places.items()
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


def test_help_and_readme_list_them():
    _, usage, _ = run_command("--help")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for option in list_untested():
        assert f"  {option}\n" in usage
        assert f"`{option}`" in readme
