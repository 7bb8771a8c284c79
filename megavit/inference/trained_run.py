"""Open a trained run on one device: its configuration and its network with the checkpoint's weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megavit.checkpoint.find import CheckpointRef, resolve_checkpoint
from megavit.checkpoint.shards import load_weights
from megavit.checkpoint.state import read_state
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_step
from megavit.config.saved import from_yaml, merge
from megavit.config.train import Compile, GradReduce
from megavit.data.class_names import go_by_number, some
from megavit.data.config import PIXEL_SETTINGS, DataConfig
from megavit.data.decode import open_image
from megavit.data.loader import Batch
from megavit.data.sampler import SampleKey
from megavit.data.sources.base import Source
from megavit.data.sources.relabel import relabel
from megavit.data.transforms.image import ImageTransform
from megavit.errors import ConfigError, printable
from megavit.model.config import AttentionBackend, LinearBackend, Positions
from megavit.optim.config import without_optimizer
from megavit.parallel.config import ParallelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.train.resume_rules import Rule, changes
from megavit.train.setup import ModelSetup, build_model
from megavit.validation import format_value


@dataclass(frozen=True)
class TrainedRun:
    """A run's full network in this process.

    Attributes:
        weights: the loaded checkpoint.
        config: the run's configuration, with the layout of one rank and torch's own kernels.
        layout: the layout of one rank.
        network: the full network, in evaluation mode.
    """

    weights: CheckpointRef
    config: ExperimentConfig
    layout: ParallelLayout
    network: ModelSetup

    def batch(self, paths: list[Path]) -> Batch:
        """Read images from files, preprocessed as in the run's evaluation, into one batch.

        Raises:
            ConfigError: if a file is not an image.
        """
        return self.collate([self.read(path) for path in paths])

    def read(self, path: Path) -> Tensor:
        """Read an image from a file, preprocessed as in the run's evaluation.

        Returns:
            uint8 image_CYX.

        Raises:
            ConfigError: if the file is not an image.
        """
        data, name = self.config.data, printable(str(path))
        return ImageTransform(data, augment=False).preprocess(
            open_image(path, channels=data.channels, name=name), name=name
        )

    def collate(self, images: list[Tensor]) -> Batch:
        """Combine images from `read` into one batch."""
        device = self.layout.device
        keys = [SampleKey(index, 0) for index in range(len(images))]
        counted = torch.ones(len(images), dtype=torch.bool, device=device)
        return Batch(torch.stack(images).to(device), {}, counted, keys)


def read_config(checkpoint: Path) -> ExperimentConfig:
    """Return a checkpoint's configuration for one rank and torch's own kernels; results depend on neither.

    User-defined code that only training needs is dropped: opening a checkpoint imports no plug-in that it names.
    """
    config = from_yaml((checkpoint / "run.yaml").read_text())
    return replace(
        config,
        run=replace(config.run, ranks=None),
        train=replace(
            config.train,
            compile=Compile.none,
            grad_reduce=GradReduce.fp32,
            gradient_accumulation_fusion=False,
        ),
        parallel=ParallelConfig(),
        # An evaluation does not mix images, so micro batches may have an odd size.
        data=replace(config.data, transform=None, mixup=None, cutmix=None, mixup_prob=1.0, mixup_switch_prob=0.5),
        task=replace(config.task, implementation=None),
        model=replace(config.model, attention_backend=AttentionBackend.sdpa, linear_backend=LinearBackend.local),
        # With base_lr the peak follows the batch size; an evaluation's small batch could give a peak below min_lr.
        optim=without_optimizer(replace(config.optim, min_lr=0.0)),
    )


def with_settings(config: ExperimentConfig, settings: list[str]) -> ExperimentConfig:
    """Replace settings of `PIXEL_SETTINGS` in a run's configuration, for weights that were trained with other values.

    Args:
        config: the run's configuration.
        settings: `key=value`, as on the command line.

    Raises:
        ConfigError: for any other setting, or a wrong value.
    """
    for text in settings:
        if text.partition("=")[0] not in PIXEL_SETTINGS:
            raise ConfigError(
                f"{text} cannot be changed for a trained network; only these can: {', '.join(PIXEL_SETTINGS)}"
            )
    if not settings:
        return config
    changed = merge(config, settings)
    changed.data.check_pixels()
    return changed


def read_classes(checkpoint: Path) -> tuple[str, ...]:
    """Return the names of a classifier's classes, in the order of its scores.

    Raises:
        ConfigError: if the checkpoint does not name them.
    """
    names = read_state(checkpoint).classes
    if not names:
        raise ConfigError(f"{checkpoint} does not name its classes")
    return tuple(names)


def label_as_trained(source: Source, config: DataConfig, checkpoint: Path) -> tuple[Source, list[str]]:
    """Map the labels of data to a checkpoint's classes by name.

    Args:
        source: data with some or all of the checkpoint's classes.
        config: the data group, for messages.
        checkpoint: a classifier's checkpoint.

    Returns:
        The source, with labels in the order of the classifier's scores; and lines that the user must see.

    Raises:
        ConfigError: if the checkpoint has no classifier, or does not have one of the data's classes.
    """
    state, data = read_state(checkpoint), f"data.source={config.source} data.path={format_value(config.path)}"
    if not state.classes:
        raise ConfigError(
            f"{checkpoint} holds an encoder without a classifier; train one with init_from={checkpoint}, or measure "
            f"its features: megavit knn from={checkpoint} data.path=…"
        )
    if state.names_classes or not go_by_number(source.classes, state.classes):
        return relabel(source, state.classes, data=data, trained=str(checkpoint)), []
    return source, [f"{checkpoint} numbers its classes: those of {data} are taken in their order, {_in_order(source)}"]


def _in_order(source: Source) -> str:
    return some([f"{number} is {name}" for number, name in enumerate(source.classes)])


def refuse_another_network(checkpoint: Path, before: ExperimentConfig, now: ExperimentConfig) -> None:
    """Check that settings describe the network of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        before: the checkpoint's configuration.
        now: the configuration to load it with.

    Raises:
        ConfigError: if the weights would not fit or would compute another function; names the settings.
    """
    differ = changes(before, now, Rule.network)
    if now.model.positions is Positions.learned and before.data.image_size != now.data.image_size:
        differ["data.image_size"] = before.data.image_size, now.data.image_size
    if differ:
        listed = "; ".join(f"{setting} was {there} and is {here}" for setting, (there, here) in differ.items())
        resize = f"; init_from={checkpoint} starts a run in another resolution" if "data.image_size" in differ else ""
        raise ConfigError(f"{checkpoint} is another network: {listed}. Use the checkpoint's values{resize}")


def read_run(place: str, *, classifies: bool, does: str) -> tuple[CheckpointRef, ExperimentConfig]:
    """Find a run's newest weights and read its configuration; check its task.

    Args:
        place: path that `resolve_checkpoint` accepts.
        classifies: true if the run must be a classifier's, false if it must be a masked autoencoder's.
        does: what only such a run can do, for the error message.

    Raises:
        ConfigError: if there is no checkpoint, or its task is another one.
    """
    weights = resolve_checkpoint(place)
    config = read_config(weights.checkpoint)
    if not (config.task.has_classes if classifies else config.task.makes_pictures):
        wanted = "a classifier" if classifies else "task=mae"
        raise ConfigError(f"from={place} is a run of task.name={config.task.name}; only {wanted} {does}")
    return weights, config


def open_run(config: ExperimentConfig, weights: CheckpointRef, *, num_classes: int) -> TrainedRun:
    """Build the network in this process and load its weights.

    Args:
        config: configuration from `read_config`.
        weights: checkpoint from `resolve_checkpoint`.
        num_classes: number of classes; 0 for a masked autoencoder.
    """
    layout = ParallelLayout.create(config.parallel, timeout_s=config.run.timeout_s)
    network = build_model(config, layout, resolve_step(config, layout.world_size, num_classes=num_classes))
    load_weights(weights.checkpoint, network.chunks, averaged=weights.averaged)
    for chunk in network.chunks.values():
        chunk.eval()
    return TrainedRun(weights, config, layout, network)
