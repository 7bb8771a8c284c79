"""Where images come from and what is done to them."""

from dataclasses import dataclass, field

from megavit.errors import ConfigError


@dataclass
class DataConfig:
    """Group `data`.

    Attributes:
        source: name of the data source.
        image_size: [height, width] in pixels, as the network sees it.
        channels: of an image.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        shift: training images are moved by up to this many pixels down and across; what enters is black.
        workers: processes that load beside the training process; 0 loads in it.
    """

    source: str = "digits"
    image_size: list[int] = field(default_factory=lambda: [8, 8])
    channels: int = 1
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    shift: int = 0
    workers: int = 0

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        if self.source != "digits":
            raise ConfigError(f"data.source={self.source} is not known; known: digits")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ConfigError(f"data.image_size={self.image_size} must be [height, width] in pixels")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} has {len(getattr(self, key))} values and data.channels="
                    f"{self.channels}; give one per channel"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"data.std={self.std} must be positive: images are divided by it")
        if not 0 <= self.shift < min(self.image_size):
            raise ConfigError(f"data.shift={self.shift} must be in [0, {min(self.image_size)}), the image's side")
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must be at least 0")
