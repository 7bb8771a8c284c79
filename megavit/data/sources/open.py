"""Open the data that the data group names."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from megavit.data.config import DataConfig
from megavit.data.sources.base import Source
from megavit.data.sources.registry import SOURCES
from megavit.data.sources.subset import choose
from megavit.errors import ConfigError
from megavit.plugins import import_plugin, is_plugin


def open_source(config: DataConfig, split: str, *, index: Path | None = None) -> Source:
    """Open the data that the configuration names.

    Args:
        config: the data group, checked.
        split: `train` or `val`.
        index: folder in which folders, images and tars cache their listing for the next start; None to cache nothing.

    Raises:
        ConfigError: if the data do not exist, or their images have another shape than the configuration states.
    """
    source = _open_plugin(config, split) if is_plugin(config.source) else _open_row(config, split, index)
    if source.image_shape is not None:
        _refuse_other_images(source.image_shape, config)
    return choose(source, config, split)


def open_splits(config: DataConfig, *, index: Path | None = None) -> tuple[Source, Source | None]:
    """Open the training and the validation split; the second is None if `data.val_fraction` is 0.

    Args:
        config: the data group, checked.
        index: see `open_source`.
    """
    training = open_source(config, "train", index=index)
    return training, open_source(config, "val", index=index) if "val" in splits(config) else None


def splits(config: DataConfig) -> tuple[str, ...]:
    """Return the splits of the data."""
    return ("train",) if config.val_fraction == 0 else ("train", "val")


def prepare_index(config: DataConfig, index: Path) -> None:
    """Cache the list of samples of both splits if the source caches it; one rank calls this before all ranks open.

    Args:
        config: the data group, checked.
        index: folder of the cache.

    Raises:
        ConfigError: if the data do not exist, or the cache cannot be written.
    """
    if config.source in SOURCES and SOURCES[config.source].caches_index:
        for split in splits(config):
            _open_row(config, split, index)


def _open_row(config: DataConfig, split: str, index: Path | None) -> Source:
    """Import and open a source of the table."""
    spec = SOURCES[config.source]
    arguments = (config, split, index) if spec.caches_index else (config, split)
    source: Source = resolve_name(spec.opener)(*arguments)
    return source


def _open_plugin(config: DataConfig, split: str) -> Source:
    """Open a user's source and check that it has what `Source` requires."""
    source_class = import_plugin(config.source, "data.source")
    _check_declared(source_class, config)
    source: Source = source_class(config, split)
    label = "labels" if config.multi_label else "label"
    missing = [name for name in ("classes", "image_shape", "__len__", "image", label) if not hasattr(source, name)]
    if missing:
        raise ConfigError(f"data.source={config.source} lacks {', '.join(missing)}; see megavit/data/sources/base.py")
    if not len(source):
        raise ConfigError(f"data.source={config.source} has no samples for the split {split}")
    return source


def _check_declared(source_class: Any, config: DataConfig) -> None:
    """Check the settings against the class attributes that a user's source declares."""
    takes_path = getattr(source_class, "takes_path", None)
    if takes_path is not None and takes_path == (config.path is None):
        reason = "needs data.path" if takes_path else f"ignores data.path={config.path}; set it to null"
        raise ConfigError(f"data.source={config.source} {reason}")
    if getattr(source_class, "reads_urls", None) is False and "://" in str(config.path):
        raise ConfigError(f"data.path={config.path} is a URL, and data.source={config.source} reads only files")
    if getattr(source_class, "multi_label", None) is False and config.multi_label:
        raise ConfigError(f"data.source={config.source} has one label for each image; set data.multi_label=false")


def _refuse_other_images(image_shape: tuple[int, ...], config: DataConfig) -> None:
    stated = (config.channels, *config.image_size)
    if image_shape != stated:
        channels, *size = image_shape
        raise ConfigError(
            f"data.channels={config.channels} and data.image_size={config.image_size} do not fit data.source="
            f"{config.source}, whose images have {channels} channels and {size} pixels; set data.channels={channels} "
            f"and data.image_size={size}, or choose another data"
        )
