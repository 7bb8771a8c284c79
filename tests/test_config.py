"""Wrong settings get one message with the arithmetic and the way out; every choice in conf/ composes."""

import pytest

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_micro_batch, resolve_num_steps
from megavit.config.saved import from_yaml, merge, to_yaml
from megavit.config.search_path import choices, groups
from megavit.config.settings import CALLED_ELSEWHERE, run_types
from megavit.config.validate import validate
from megavit.errors import ConfigError

CHOICES = [(group, choice) for group in groups() for choice in choices(group)]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{g}={c}" for g, c in CHOICES])
def test_every_choice_composes(group, choice):
    extra = ["data=synthetic", "train.epochs=1"] if group == "model" and choice != "vit_digits" else []
    if group == "data" and choice != "digits":
        extra = ["train.epochs=1"]
    if group == "data" and choice not in ("digits", "synthetic"):
        extra.append("data.path=/data")
    if group == "recipe" and compose([f"recipe={choice}"]).data.source in ("folder", "parquet"):
        extra.append("data.path=/data")
    if (group, choice) == ("optim", "sgd"):
        extra.append("optim.lr=0.1")
    config = compose([f"{group}={choice}", *extra])
    validate(config, 1)
    assert from_yaml(to_yaml(config)) == config


def test_a_saved_configuration_with_a_removed_setting_is_read():
    config = compose([])
    text = to_yaml(config).replace("parallel:\n", "parallel:\n  cp: 1\n")
    assert "  cp: 1\n" in text
    assert from_yaml(text) == config


def test_other_data_drop_the_recipe_of_the_digits_unless_it_is_typed():
    with_recipe = compose(["recipe=digits", "data.path=/data"])
    assert (compose([]).run.name, with_recipe.run.name) == ("digits", "digits")
    for data in ("data=folder", "data.path=/data"):
        own = compose([data])
        assert (own.run.name, own.train.steps, own.model.patch_size) == ("run", None, 16)
    assert compose(["data=digits"]).run.name == "digits"
    assert compose(["recipe=null"]).run.name == "run"


def test_every_group_is_a_folder_and_a_field():
    fields = set(ExperimentConfig.__dataclass_fields__)
    assert set(groups()) - {"recipe"} == fields - {"run", "train", "init_from"}


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["model.hiden_size=3"], 1, r"model\.hiden_size does not exist; did you mean model\.hidden_size"),
        (["lr=1"], 1, r"the setting lr does not exist; did you mean optim\.lr"),
        (["optim.learning_rate=1"], 1, r"optim\.learning_rate does not exist; did you mean optim\.lr"),
        (["data.batch_size=8"], 1, r"data\.batch_size does not exist; did you mean train\.global_batch"),
        (["optim.max_steps=8"], 1, r"optim\.max_steps does not exist; did you mean train\.steps"),
        (["num_workers=8"], 1, r"num_workers does not exist; did you mean data\.workers"),
        (["model.img_size=8"], 1, r"model\.img_size does not exist; did you mean data\.image_size"),
        (["evaluation.every=8"], 1, r"evaluation\.every does not exist; did you mean train\.eval_every"),
        (["+trainer.steps=1"], 1, r"trainer\.steps does not exist; did you mean train\.steps"),
        (["model=vit_b61"], 1, r"model=vit_b61 does not exist; did you mean model=vit_b16"),
        (["recipe=mnist"], 1, "recipe=mnist does not exist; (known|did you mean)"),
        (
            ["model.num_layers=many"],
            1,
            "model.num_layers: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (["model.pool=max"], 1, r"model.pool: Invalid value 'max', expected one of \[cls, mean\]"),
        (["train.steps"], 1, "write key=value"),
        (["data.mean=[0.5"], 1, r"'data.mean=\[0.5' cannot be read: "),
        (["train={steps: 1}"], 1, r"train is a group of \d+ settings; set one of them: train\.steps"),
        (
            ["parallel.tp=4", "parallel.pp=3"],
            8,
            r"world size 8 is not a multiple of parallel.tp=4 × parallel.pp=3 = 12; launch 12",
        ),
        (["parallel.tp=2", "parallel.pp=2"], 6, r"world size 6 .* = 4; launch 4 or 8 ranks"),
        (
            ["model.num_heads=2", "parallel.tp=4"],
            4,
            r"model.num_heads=2 is not divided by parallel.tp=4: 2 mod 4 = 2; set parallel.tp=2",
        ),
        (["model.num_heads=3"], 1, r"64 mod 3 = 1"),
        (
            ["parallel.tp=2", "parallel.sequence_parallel=true"],
            2,
            r"16 patches \+ 1 class tokens = 17 tokens .* 17 mod 2 = 1; set model.class_tokens=0 \(16 \+ 0 = 16\) or model.class_tokens=8 \(16 \+ 8 = 24\) or parallel.sequence_parallel=false",
        ),
        (["parallel.sequence_parallel=true"], 1, "parallel.tp=1 has one"),
        (
            ["train.global_batch=100", "train.micro_batch=64"],
            1,
            r"train.global_batch=100 is not a multiple of train.micro_batch=64 × data-parallel size 1 = 64; set train.global_batch=128",
        ),
        (["train.global_batch=64", "train.micro_batch=64"], 2, "train.micro_batch=64 × data-parallel size 2 = 128"),
        (["data.image_size=[9,8]"], 1, r"9 mod 2 = 1.* nearest: 8, 10 high and 8 wide"),
        (
            ["data.image_size=9"],
            1,
            r"data.image_size=\[9, 9\] is not divisible by model.patch_size=2: .* nearest: 8, 10$",
        ),
        (["data.mean=[0.5,0.5]"], 1, "has 2 values and data.channels=1"),
        (["train.steps=50", "optim.warmup_steps=100"], 1, "optim.warmup_steps=100 must be below the run's 50 steps"),
        (["train.steps=null"], 1, "say how long to train: train.epochs=10"),
        (["model.class_tokens=0"], 1, "model.pool=cls needs a class token"),
        (["model.drop_path=1"], 1, "model.drop_path=1.0 must be a finite number at least 0 and below 1"),
        (["parallel.tp=0"], 1, "parallel.tp=0 must be a finite number at least 1"),
        (["data.source=imagenet"], 1, "did you mean images?"),
        (["data.source=nothing"], 1, "known: digits"),
        (["data.num_samples=5"], 1, "all others need null"),
        (["optim.lr=nan"], 1, "optim.lr=nan must be a finite number"),
        (["train.epochs=inf"], 1, "train.epochs=inf must be a finite number"),
        (["run.ranks=0"], 1, "run.ranks=0 must be a finite number at least 1"),
        (["run.ranks=4"], 2, "another launcher has started 2 ranks"),
        (["run.timeout_s=1"], 1, "at least 60"),
        (["run.name=.."], 1, "must be a word"),
        (["train.stop_at=9999"], 1, "is after the last step"),
        (["parallel.pp=8"], 8, "model.num_layers=4 cannot fill parallel.pp=8"),
        (["run.name=a/b"], 1, "without a slash"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_settings_are_refused_with_the_way_out(overrides, world, message):
    with pytest.raises(ConfigError, match=message) as refused:
        validate(compose(overrides), world)
    assert "\n" not in str(refused.value)


def test_what_other_trainers_call_a_setting_leads_to_one_that_exists():
    assert set(CALLED_ELSEWHERE.values()) <= set(run_types())
    assert not set(CALLED_ELSEWHERE) & {key.rpartition(".")[2] for key in run_types()}


def test_one_number_is_both_sides_of_an_image():
    assert compose(["data.image_size=16"]).data.image_size == [16, 16]
    assert merge(ExperimentConfig(), ["data.image_size=224"]).data.image_size == [224, 224]


def test_typing_epochs_clears_steps():
    config = compose(["train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2)
    # 2 · 1437 / 64 = 44.9: the run ends with the step that completes the second epoch.
    config.optim.warmup_steps = 1
    assert resolve_num_steps(config, 1437) == 45


def test_what_is_typed_decides_over_the_recipe():
    assert compose(["recipe=digits", "model=vit_ti16"]).model.hidden_size == 192


def test_a_recipe_may_be_left_away():
    config = compose(["recipe=null", "data=synthetic", "train.steps=3", "model=vit_b16", "train.global_batch=8"])
    validate(config, 2)
    assert resolve_micro_batch(config, 2) == 4
    assert config.run.name == "run"


def test_data_that_does_not_match_the_settings_is_named():
    from megavit.data.sources.open import open_source

    config = compose(["data.image_size=[16,16]"])
    with pytest.raises(ConfigError, match=r"images have 1 channels and \[8, 8\] pixels; set data.channels=1"):
        open_source(config.data, "train")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    from megavit.parallel.cpu_backend import run_on_cpu

    monkeypatch.setenv("MEGAVIT_DEVICE", "tpu")
    run_on_cpu.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"MEGAVIT_DEVICE=tpu .* known: cpu, cuda"):
            run_on_cpu()
    finally:
        run_on_cpu.cache_clear()
