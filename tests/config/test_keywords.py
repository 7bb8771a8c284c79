from pathlib import Path

import pytest

from megavit.config.compose import compose
from megavit.config.keywords import to_overrides
from megavit.config.train import Precision
from megavit.errors import ConfigError


def overrides(*arguments, **settings) -> list[str]:
    return to_overrides(arguments, settings, takes_recipe=True)


def test_a_first_argument_without_an_equals_sign_is_the_recipe():
    assert overrides("digits", "optim.lr=1e-3") == ["recipe=digits", "optim.lr=1e-3"]
    assert overrides(Path("a=b/mine.yaml")) == ['recipe="a=b/mine.yaml"']
    assert overrides("~recipe", "+optim.lr=1") == ["~recipe", "+optim.lr=1"]
    with pytest.raises(ConfigError, match="'steps' is no setting: write key=value, and the recipe first"):
        overrides("digits", "steps")
    with pytest.raises(ConfigError, match="'digits' is no setting: write key=value"):
        to_overrides(["digits"], {}, takes_recipe=False)


def test_a_word_that_one_setting_has_names_it_and_another_is_refused_with_the_candidates():
    assert overrides(steps=200, mask_ratio=0.5, task="mae") == ["train.steps=200", "task.mask_ratio=0.5", "task=mae"]
    with pytest.raises(ConfigError, match=r"name= could be run.name or task.name or optim.name; write the path"):
        overrides(name="x")
    with pytest.raises(ConfigError, match=r"learning_rate does not exist; did you mean optim.lr"):
        compose(overrides(learning_rate=1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", "100"),
        ("run.name", "null"),
        ("run.name", "~"),
        ("run.name", "a b,c=[d]"),
        ("run.name", 'say "no"\\'),
        ("run.name", "ein Ölfaß"),
        ("run.dir", "x${run.name}"),
        ("init_from", None),
        ("data.path", "1e3"),
        ("data.path", "null"),
        ("data.classes", ["a", "b,c", "null", "7", "", "x[y"]),
        ("data.mean", [0.1]),
        ("data.image_size", [8, 16]),
        ("data.flip", True),
        ("optim.lr", 1e-05),
        ("optim.lr", 3),
        ("optim.betas", (0.9, 0.95)),
        ("optim.freeze", None),
        ("train.eval_every", "auto"),
        ("train.eval_every", 7),
        ("train.eval_every", None),
        ("train.precision", Precision.bf16_o2),
        ("train.precision", "bf16_o2"),
        ("checkpoint.resume", Path("a b") / "c"),
    ],
)
def test_a_python_value_is_composed_to_itself(key, value):
    config = compose(overrides("digits", **{key: value}))
    for part in key.split("."):
        config = getattr(config, part)
    expected = {Path: str, tuple: list}.get(type(value), lambda same: same)(value)
    if isinstance(value, Path):
        expected = str(value)
    if value == "bf16_o2":
        expected = Precision.bf16_o2
    if key == "run.dir":
        expected = "xdigits"
    assert config == expected


def test_numbers_of_numpy_and_torch_are_numbers():
    import numpy as np
    import torch

    assert overrides(lr=np.float64(0.25), seed=np.int64(3)) == ["optim.lr=0.25", "run.seed=3"]
    assert overrides(steps=torch.tensor(5)) == ["train.steps=5"]


def test_a_dictionary_sets_keys_below_its_group():
    assert overrides(optim={"lr": 0.1, "betas": [0.9, 0.99]}) == ["optim.lr=0.1", "optim.betas=[0.9,0.99]"]


def test_an_object_is_taken_by_the_settings_of_own_parts_alone():
    import torch

    assert overrides(optimizer=torch.optim.RAdam) == ['optim.name="torch.optim.radam:RAdam"']
    assert overrides(optimizer="lars", source="folder") == ["optim.name=lars", "data.source=folder"]
    with pytest.raises(ConfigError, match="lr takes a value, not the object"):
        overrides(lr=torch.optim.RAdam)
    with pytest.raises(ConfigError, match=r"data.transform: .* cannot be imported by another process"):
        overrides(transform=lambda image: image)
