"""The tasks by name. A new task is a file with its config and its class, a YAML in conf/task/ and a row here."""

from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.plugins import import_plugin
from megavit.task.base import Task
from megavit.task.classification import ClassificationTask, LinearProbeTask
from megavit.task.config import TaskConfig, TaskName
from megavit.task.mae import MaeTask

TASKS: dict[TaskName, type[Task]] = {
    TaskName.classify: ClassificationTask,
    TaskName.linear_probe: LinearProbeTask,
    TaskName.mae: MaeTask,
}


def build_task(
    config: TaskConfig, *, model: ModelConfig, data: DataConfig, num_classes: int, layout: ParallelLayout, seed: int
) -> Task:
    """Build the task that the configuration names.

    Args:
        config: the task group.
        model: the model group.
        data: the data group.
        num_classes: classes of the data's labels; 0 without labels.
        layout: this rank's place.
        seed: `run.seed`, of masks, and of erasing and mixing on the device.

    Raises:
        ConfigError: if the task needs labels and the data have none.
    """
    if config.name.classifies and not num_classes:
        raise ConfigError(
            f"task.name={config.name.value} needs labels, and data.source={data.source} has none in "
            f"data.path={data.path}; task=mae learns without"
        )
    make: type[Task] = TASKS[config.name]
    if config.implementation is not None:
        make = import_plugin(config.implementation, "task.implementation")
    return make(config, model=model, data=data, num_classes=num_classes, layout=layout, seed=seed)
