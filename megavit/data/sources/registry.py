"""From the data group to an open source."""

from collections.abc import Callable
from pathlib import Path

from megavit.data.config import DataConfig
from megavit.data.sources.base import Source
from megavit.data.sources.csv_file import open_csv
from megavit.data.sources.digits import Digits
from megavit.data.sources.hf_dataset import open_arrow, open_hub, open_parquet
from megavit.data.sources.image_folder import open_folder, open_images
from megavit.data.sources.subset import choose
from megavit.data.sources.synthetic import Synthetic
from megavit.data.sources.webdataset import open_tars
from megavit.errors import ConfigError
from megavit.plugins import import_plugin, is_plugin

_SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "digits": lambda config, split: Digits(split),
    "synthetic": Synthetic,
    "csv": open_csv,
    "parquet": open_parquet,
    "arrow": open_arrow,
    "hub": open_hub,
}

# Those that list what may be millions of samples, and keep the listing for the next start.
_INDEXED: dict[str, Callable[[DataConfig, str, Path | None], Source]] = {
    "folder": open_folder,
    "images": open_images,
    "tar": open_tars,
}


def open_source(config: DataConfig, split: str, *, index: Path | None = None) -> Source:
    """Open the data that the configuration names.

    Args:
        config: the data group, checked.
        split: `train` or `val`.
        index: folder in which folders, images and tars keep their listing for the next start; None to keep none.

    Raises:
        ConfigError: if it is not there, or its images are not of the channels that the configuration states.
    """
    if config.source in _INDEXED:
        source = _INDEXED[config.source](config, split, index)
    else:
        source = _own(config, split) if is_plugin(config.source) else _SOURCES[config.source](config, split)
    if source.image_shape is not None:
        _refuse_other_images(source.image_shape, config)
    return choose(source, config, split)


def open_splits(config: DataConfig, *, index: Path | None = None) -> tuple[Source, Source | None]:
    """Open what a run trains on and what it validates on; None for the second where `data.val_fraction` is 0.

    Args:
        config: the data group, checked.
        index: see `open_source`.
    """
    training = open_source(config, "train", index=index)
    return training, open_source(config, "val", index=index) if "val" in splits(config) else None


def splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that the data have."""
    return ("train",) if config.val_fraction == 0 else ("train", "val")


def prepare_index(config: DataConfig, index: Path) -> None:
    """List the samples of both splits, if that takes long, and keep the listing; one rank calls this before all open.

    Raises:
        ConfigError: if the data are not there, or the listing cannot be kept.
    """
    if config.source in _INDEXED:
        for split in splits(config):
            _INDEXED[config.source](config, split, index)


def _own(config: DataConfig, split: str) -> Source:
    """A user's source, held to what `Source` asks for."""
    source = import_plugin(config.source, "data.source")(config, split)
    label = "labels" if config.multi_label else "label"
    missing = [name for name in ("classes", "image_shape", "__len__", "image", label) if not hasattr(source, name)]
    if missing:
        raise ConfigError(f"data.source={config.source} lacks {', '.join(missing)}; see megavit/data/sources/base.py")
    if not len(source):
        raise ConfigError(f"data.source={config.source} has no samples for the split {split}")
    return source


def _refuse_other_images(image_shape: tuple[int, ...], config: DataConfig) -> None:
    stated = (config.channels, *config.image_size)
    if image_shape != stated:
        channels, *size = image_shape
        raise ConfigError(
            f"data.channels={config.channels} and data.image_size={config.image_size} do not fit data.source="
            f"{config.source}, whose images have {channels} channels and {size} pixels; set data.channels={channels} "
            f"and data.image_size={size}, or choose another data"
        )
