"""What every data source offers."""

from typing import Protocol

from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.digits import Digits
from megavit.data.synthetic import Synthetic
from megavit.errors import ConfigError


class Source(Protocol):
    """Images by index, as uint8, with labels that cost no decoding.

    Attributes:
        classes: class names, in label order.
        image_shape: (channels, height, width) of every image.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, ...]

    def __len__(self) -> int:
        """Samples."""
        ...

    def image(self, index: int) -> Tensor:
        """One image_CYX, uint8."""
        ...

    def label(self, index: int) -> int:
        """One label, in [0, number of classes)."""
        ...


def open_source(config: DataConfig, split: str) -> Source:
    """Open the data that the configuration names.

    Args:
        config: the data group, checked.
        split: `train` or `val`.

    Raises:
        ConfigError: if its images are not of the size and channels that the configuration states.
    """
    source: Source = Digits(split) if config.source == "digits" else Synthetic(config, split)
    stated = (config.channels, *config.image_size)
    if source.image_shape != stated:
        channels, *size = source.image_shape
        raise ConfigError(
            f"data.channels={config.channels} and data.image_size={config.image_size} do not fit data.source="
            f"{config.source}, whose images have {channels} channels and {size} pixels; set data.channels={channels} "
            f"and data.image_size={size}, or choose another data"
        )
    return source
