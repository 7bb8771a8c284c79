"""A run that has trained, opened on one device to be looked at: its configuration, its network with its weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megavit.checkpoint.find import CheckpointRef, resolve_checkpoint
from megavit.checkpoint.shards import load_weights
from megavit.checkpoint.state import read_state
from megavit.config.compose import from_yaml, merge
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_step
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
    """A run's network on this process alone.

    Attributes:
        weights: that it has.
        config: what it was made with, its layout replaced by one rank and its kernels by torch's own.
        layout: one rank.
        network: evaluating, whole.
    """

    weights: CheckpointRef
    config: ExperimentConfig
    layout: ParallelLayout
    network: ModelSetup

    def batch(self, paths: list[Path]) -> Batch:
        """Images from files, as the run evaluates them, in one batch.

        Raises:
            ConfigError: for a file that is no image.
        """
        return self.collate([self.read(path) for path in paths])

    def read(self, path: Path) -> Tensor:
        """An image from a file, as the run evaluates it: uint8 image_CYX.

        Raises:
            ConfigError: for a file that is no image.
        """
        data, name = self.config.data, printable(str(path))
        return ImageTransform(data, augment=False).preprocess(
            open_image(path, channels=data.channels, name=name), name=name
        )

    def collate(self, images: list[Tensor]) -> Batch:
        """Images as `read` gives them, in one batch."""
        device = self.layout.device
        keys = [SampleKey(index, 0) for index in range(len(images))]
        counted = torch.ones(len(images), dtype=torch.bool, device=device)
        return Batch(torch.stack(images).to(device), {}, counted, keys)


def read_config(checkpoint: Path) -> ExperimentConfig:
    """What a checkpoint was made with, for one rank and torch's own kernels: results depend on neither.

    Parts of its user's own that only training needs are left away: to look at a checkpoint runs no code that it names.
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
        # Nothing is mixed in an evaluation, so micro batches need not be even.
        data=replace(config.data, transform=None, mixup=None, cutmix=None, mixup_prob=1.0, mixup_switch_prob=0.5),
        task=replace(config.task, implementation=None),
        model=replace(config.model, attention_backend=AttentionBackend.sdpa, linear_backend=LinearBackend.local),
        # With base_lr the peak follows the batch, and an evaluation's may be so small that it comes out below min_lr.
        optim=without_optimizer(replace(config.optim, min_lr=0.0)),
    )


def with_settings(config: ExperimentConfig, settings: list[str]) -> ExperimentConfig:
    """Put settings of `PIXEL_SETTINGS` over a run's, where its weights were made with others.

    Args:
        config: of the run.
        settings: `key=value`, as typed.

    Raises:
        ConfigError: for another setting, or a value that does not fit.
    """
    for text in settings:
        if text.partition("=")[0] not in PIXEL_SETTINGS:
            raise ConfigError(f"{text}: a trained network is as it was; one may set {', '.join(PIXEL_SETTINGS)}")
    if not settings:
        return config
    changed = merge(config, settings)
    changed.data.check_pixels()
    return changed


def read_classes(checkpoint: Path) -> tuple[str, ...]:
    """The names of a classifier's classes, in the order of its scores.

    Raises:
        ConfigError: if the checkpoint does not say.
    """
    names = read_state(checkpoint).classes
    if not names:
        raise ConfigError(f"{checkpoint} does not name its classes")
    return tuple(names)


def label_as_trained(source: Source, config: DataConfig, checkpoint: Path) -> tuple[Source, list[str]]:
    """Label data as a checkpoint's classifier does, by the names of the classes.

    Args:
        source: data with some of its classes or all of them.
        config: the data group, which names the source.
        checkpoint: of a classifier.

    Returns:
        The source, its classes in the order of the classifier's scores; and what the user must know of them, in lines.

    Raises:
        ConfigError: if there is no classifier, or it does not know one of the data's classes.
    """
    state, data = read_state(checkpoint), f"data.source={config.source} data.path={format_value(config.path)}"
    if not state.classes:
        raise ConfigError(
            f"{checkpoint} holds an encoder without a classifier; train one with init_from={checkpoint}, or see how "
            f"far its features go: megavit knn from={checkpoint} data.path=…"
        )
    if state.names_classes or not go_by_number(source.classes, state.classes):
        return relabel(source, state.classes, data=data, trained=str(checkpoint)), []
    return source, [f"{checkpoint} numbers its classes: those of {data} are taken in their order, {_in_order(source)}"]


def _in_order(source: Source) -> str:
    return some([f"{number} is {name}" for number, name in enumerate(source.classes)])


def refuse_another_network(checkpoint: Path, before: ExperimentConfig, now: ExperimentConfig) -> None:
    """Refuse settings under which a checkpoint's weights would not fit, or be another function.

    Args:
        checkpoint: the weights.
        before: what they were made with.
        now: what they are to be read with.

    Raises:
        ConfigError: naming the settings.
    """
    differ = changes(before, now, Rule.network)
    if now.model.positions is Positions.learned and before.data.image_size != now.data.image_size:
        differ["data.image_size"] = before.data.image_size, now.data.image_size
    if differ:
        listed = "; ".join(f"{setting} is {there} there, not {here}" for setting, (there, here) in differ.items())
        resize = f"; init_from={checkpoint} starts a run in another resolution" if "data.image_size" in differ else ""
        raise ConfigError(f"{checkpoint} is another network: {listed}. Leave it as it is there{resize}")


def read_run(place: str, *, classifies: bool, does: str) -> tuple[CheckpointRef, ExperimentConfig]:
    """The newest weights of a run of one kind of task, and its configuration.

    Args:
        place: what `resolve_checkpoint` takes.
        classifies: whether the run must be a classifier's, or else a masked autoencoder's.
        does: what only such a run can do, for the error.

    Raises:
        ConfigError: if there is no checkpoint, or it is of another task.
    """
    weights = resolve_checkpoint(place)
    config = read_config(weights.checkpoint)
    if not (config.task.has_classes if classifies else config.task.makes_pictures):
        wanted = "a classifier" if classifies else "task=mae"
        raise ConfigError(f"from={place} is a run of task.name={config.task.name}; only {wanted} {does}")
    return weights, config


def open_run(config: ExperimentConfig, weights: CheckpointRef, *, num_classes: int) -> TrainedRun:
    """Build the network on this process and read its weights.

    Args:
        config: from `read_config`.
        weights: from `resolve_checkpoint`.
        num_classes: of the data; a masked autoencoder has none.
    """
    layout = ParallelLayout.create(config.parallel, timeout_s=config.run.timeout_s)
    network = build_model(config, layout, resolve_step(config, layout.world_size, num_classes=num_classes))
    load_weights(weights.checkpoint, network.chunks, averaged=weights.averaged)
    for chunk in network.chunks.values():
        chunk.eval()
    return TrainedRun(weights, config, layout, network)
