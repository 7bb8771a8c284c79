"""The table of tasks. A new task is a file with its config and its class, a YAML in conf/task/ and a row here."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig
from megavit.plugins import import_plugin
from megavit.task.config import ClassificationConfig, LinearProbeConfig, MaeConfig, TaskConfig

if TYPE_CHECKING:
    from megavit.parallel.layout import ParallelLayout
    from megavit.task.base import Task


@dataclass(frozen=True)
class TaskRow:
    """A task of the registry.

    Attributes:
        config: class of its settings.
        implementation: package.module:name of its class. It is imported when a network is built, so that a command that
            only reads settings does not import torch.
    """

    config: type[TaskConfig]
    implementation: str


TASKS = {
    "classify": TaskRow(ClassificationConfig, "megavit.task.classification:ClassificationTask"),
    "linear_probe": TaskRow(LinearProbeConfig, "megavit.task.classification:ClassificationTask"),
    "mae": TaskRow(MaeConfig, "megavit.task.mae:MaeTask"),
}


def config_class(name: Any) -> type[TaskConfig]:
    """Return the class of a task's settings.

    Args:
        name: `task.name`.

    Raises:
        ConfigError: if there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"task.name={name} does not exist; known: {', '.join(TASKS)}")
    return TASKS[name].config


def tasks_with(setting: str) -> list[str]:
    """Return the names of the tasks that have a setting, `mask_ratio` for example."""
    return [name for name, row in TASKS.items() if setting in row.config.__dataclass_fields__]


def build_task(
    config: TaskConfig, *, model: ModelConfig, data: DataConfig, num_classes: int, layout: "ParallelLayout", seed: int
) -> "Task":
    """Build the task that the configuration names.

    Args:
        config: the task group.
        model: the model group.
        data: the data group.
        num_classes: classes of the data's labels; 0 without labels.
        layout: this rank's place.
        seed: `run.seed`, for masks, and for erasing and mixing on the device.

    Raises:
        ConfigError: if the task needs labels and the data have none.
    """
    if config.has_classes and not num_classes:
        raise ConfigError(
            f"task.name={config.name} needs labels, and data.source={data.source} has none in "
            f"data.path={data.path}; task=mae needs none"
        )
    if config.implementation is not None:
        make = import_plugin(config.implementation, "task.implementation")
    else:
        module, _, name = TASKS[config.name].implementation.partition(":")
        make = getattr(import_module(module), name)
    task: Task = make(config, model=model, data=data, num_classes=num_classes, layout=layout, seed=seed)
    return task
