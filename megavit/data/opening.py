"""From the data group to an open source."""

from collections.abc import Callable

from megavit.data.config import DataConfig
from megavit.data.digits import Digits
from megavit.data.folder import Folder
from megavit.data.parquet import Parquet
from megavit.data.source import Source
from megavit.data.subset import choose
from megavit.data.synthetic import Synthetic
from megavit.errors import ConfigError

_SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "digits": lambda config, split: Digits(split),
    "synthetic": Synthetic,
    "folder": Folder,
    "parquet": Parquet,
}


def open_source(config: DataConfig, split: str) -> Source:
    """Open the data that the configuration names.

    Args:
        config: the data group, checked.
        split: `train` or `val`.

    Raises:
        ConfigError: if it is not there, or its images are not of the channels that the configuration states.
    """
    source = _SOURCES[config.source](config, split)
    if source.image_shape is not None:
        _refuse_other_images(source.image_shape, config)
    return choose(source, config, split)


def _refuse_other_images(image_shape: tuple[int, ...], config: DataConfig) -> None:
    stated = (config.channels, *config.image_size)
    if image_shape != stated:
        channels, *size = image_shape
        raise ConfigError(
            f"data.channels={config.channels} and data.image_size={config.image_size} do not fit data.source="
            f"{config.source}, whose images have {channels} channels and {size} pixels; set data.channels={channels} "
            f"and data.image_size={size}, or choose another data"
        )
