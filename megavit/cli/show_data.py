"""Draw the first training images as the network gets them, as a picture (`megavit show-data key=value …`)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megavit.cli.arguments import argument
from megavit.cli.config_flags import ConfigFlags, show_configuration
from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.validate import check_task
from megavit.data.loader import Batch, Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources.label_checks import describe_oddities
from megavit.data.sources.open import open_source
from megavit.data.transforms.device import DeviceTransforms
from megavit.errors import ConfigError
from megavit.metrics.plots import draw_samples
from megavit.parallel.layout import ParallelLayout
from megavit.runtime.output import complete_file
from megavit.task.masking import hidden_mask, random_keep

_HIDDEN = 127


@dataclass(frozen=True)
class ShowDataArgs(ConfigFlags):
    """The command's own arguments.

    Attributes:
        out: the picture; without it RUN/pictures/data.png.
        count: number of images to draw.
    """

    out: Path | None = argument(None, form="PICTURE.png")
    count: int = 16


def show_data(args: ShowDataArgs, settings: list[str]) -> int:
    """Draw the first training images in the order of training: the originals, and the network's inputs.

    They come from a run's loader and transforms. The samples and their augmentations do not depend on the layout, so
    this process shows the inputs of any number of ranks.

    Args:
        args: the command's own arguments.
        settings: `key=value`, as in `megavit train`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if a setting is wrong, or the data cannot be read.
    """
    if args.only_shows:
        show_configuration(args, settings)
        return 0
    config = compose(settings)
    for group in (config.model, config.task, config.data):
        group.check()
    check_task(config)
    count = args.count
    if config.data.mixes and count % 2:
        raise ConfigError(f"count={count} is odd, and images are mixed in pairs; set count={count + 1}")
    source = open_source(config.data, "train")
    labelled = bool(source.classes) and config.task.has_classes
    loader = Loader(
        source,
        replace(config.data, workers=0),
        layout=ParallelLayout.alone(),
        fields=RequiredFields(images=True, targets=("labels",) if labelled else ()),
        micro_batch=count,
        seed=config.run.seed,
        train=True,
    )
    (batch,) = loader.train_batches(0, num_steps=1, global_batch=count)
    device = DeviceTransforms(config.data, seed=config.run.seed, device=torch.device("cpu"))
    seen_BCYX = (device.normalize.undo(device(batch)).clamp(0, 1) * 255).round().to(torch.uint8)
    rows = {"original": [source.image(key.sample_id) for key in batch.keys], "seen": list(seen_BCYX)}
    if config.visible_patches < config.num_patches:
        rows["masked"] = list(_masked(seen_BCYX, batch, config))
    captions = {}
    if labelled:
        assert "labels" in batch.targets
        names = _names(source.classes, batch.targets["labels"])
        mix = device.mix(batch)
        captions["original"] = names
        if mix is not None:
            captions["seen"] = [_shares(names, row, share) for row, share in enumerate(mix.share_B.tolist())]
    out = args.out or Path(config.run.dir) / "pictures" / "data.png"
    with complete_file(out) as temporary:
        draw_samples(rows, captions=captions, path=temporary)
    for line in describe_oddities({"train": source}):
        print(line)
    print(f"{out}: the first {count} of {len(source):,} training images of data.source={config.data.source}")
    return 0


def _names(classes: tuple[str, ...], labels_B: Tensor) -> list[str]:
    """Return each image's class, or its classes joined by commas."""
    if labels_B.ndim == 1:
        return [classes[label] for label in labels_B.tolist()]
    return [", ".join(classes[label] for label in row.nonzero().flatten().tolist()) or "none" for row in labels_B]


def _shares(names: list[str], row: int, share: float) -> str:
    """Return the classes of a mixed image and their fractions, on two lines: `cat 0.70` and `+ dog 0.30`."""
    return names[row] if share == 1 else f"{names[row]} {share:.2f}\n+ {names[row ^ 1]} {1 - share:.2f}"


def _masked(images_BCYX: Tensor, batch: Batch, config: ExperimentConfig) -> Tensor:
    """Return the images with the patches grey that are hidden from the encoder."""
    num_visible, side = config.task.num_visible_patches(config.num_patches), config.model.patch_size
    ids_B, epochs_B, occurrences_B = batch.key_columns()
    ids_keep_BK = random_keep(
        ids_B, epochs_B, occurrences_B, config.num_patches, num_kept=num_visible, seed=config.run.seed
    )
    rows, columns = config.model.patch_grid(config.data.image_size)
    hidden_BYX = hidden_mask(ids_keep_BK, config.num_patches).view(-1, rows, columns)
    hidden_BYX = hidden_BYX.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return images_BCYX.masked_fill(hidden_BYX.unsqueeze(1), _HIDDEN)
