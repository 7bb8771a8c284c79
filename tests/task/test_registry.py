"""The table of tasks: each task has its own settings, and saved configurations of earlier runs are read."""

from dataclasses import replace
from importlib import import_module

import pytest

from megavit.config.compose import compose
from megavit.config.overrides import types_of
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.settings import run_types
from megavit.errors import ConfigError
from megavit.task.base import Task
from megavit.task.config import ClassificationConfig, LinearProbeConfig, MaeConfig
from megavit.task.registry import TASKS


def test_each_row_names_a_task_and_settings_of_its_own_name():
    for name, row in TASKS.items():
        module, _, attribute = row.implementation.partition(":")
        assert issubclass(getattr(import_module(module), attribute), Task)
        assert row.config().name == name


def test_a_setting_of_several_tasks_has_one_type():
    for row in TASKS.values():
        assert types_of(row.config, "task.").items() <= run_types().items()


@pytest.mark.parametrize(
    ("task", "config"), [("classify", ClassificationConfig), ("linear_probe", LinearProbeConfig), ("mae", MaeConfig)]
)
def test_a_task_has_only_its_own_settings_and_their_defaults_are_those_of_its_yaml(task, config):
    composed = compose([f"task={task}"])
    assert type(composed.task) is config
    assert composed.task == config().with_sizes(composed.model)
    assert from_yaml(to_yaml(composed)) == composed


OTHERS = [
    "label_smoothing",
    "loss",
    "class_weights",
    "mask_ratio",
    "norm_pix_loss",
    "decoder_num_layers",
    "baseline_samples",
]


@pytest.mark.parametrize("task", list(TASKS))
def test_a_saved_configuration_with_nulls_for_other_tasks_settings_is_read(task):
    composed = compose([f"task={task}"])
    nulls = "".join(f"  {setting}: null\n" for setting in OTHERS if not hasattr(composed.task, setting))
    text = to_yaml(composed).replace("\ntask:\n", f"\ntask:\n{nulls}")
    assert nulls
    assert from_yaml(text) == composed


def test_a_saved_configuration_from_before_there_was_a_choice_of_losses_means_cross_entropy():
    composed = compose([])
    text = to_yaml(composed).replace("loss: cross_entropy", "loss: null")
    assert "loss: null" in text
    assert from_yaml(text) == composed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task=mae", "task.label_smoothing=0.1"],
            "task.label_smoothing=0.1 would be ignored by task.name=mae: it is a setting of task=classify and "
            "task=linear_probe; remove it",
        ),
        (
            ["recipe=digits_mae", "task=classify"],
            "task.norm_pix_loss would be ignored by task.name=classify: it is a setting of task=mae; remove it",
        ),
        (["task.name=mae"], "task.name=mae: choose the task with its settings, by task=mae"),
        (["task.name=draw"], "task.name=draw does not exist; known: classify, linear_probe, mae"),
        (
            ["task=mae", "task.mask_ration=0.5"],
            "the setting task.mask_ration does not exist; did you mean task.mask_ratio, data.val_fraction or "
            "data.max_bad_fraction?",
        ),
    ],
)
def test_the_error_for_a_setting_of_another_task_names_that_task(overrides, message):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert str(error.value) == message


def test_a_saved_configuration_of_an_unknown_task_is_refused():
    composed = compose([])
    text = to_yaml(replace(composed, task=replace(composed.task, name="draw")))
    with pytest.raises(ConfigError, match=r"task.name=draw does not exist"):
        from_yaml(text)
