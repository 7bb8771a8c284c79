"""Where images come from and what is done to them."""

from dataclasses import dataclass, field

from megavit.checks import require_number
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
        num_classes: of the synthetic source; null for others, which know theirs.
        num_samples: of the synthetic source's training split; null for others.
        shift: training images are moved by up to this many pixels down and across; what enters is black.
        workers: processes that load beside the training process; 0 loads in it.
    """

    source: str = "digits"
    image_size: list[int] = field(default_factory=lambda: [8, 8])
    channels: int = 1
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    num_classes: int | None = None
    num_samples: int | None = None
    shift: int = 0
    workers: int = 0

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        known = ("digits", "synthetic")
        if self.source not in known:
            raise ConfigError(f"data.source={self.source} is not known; known: {', '.join(known)}")
        require_number("data", self, "channels", at_least=1)
        require_number("data", self, "num_classes", "num_samples", at_least=1)
        require_number("data", self, "workers", at_least=0)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ConfigError(f"data.image_size={self.image_size} must be [height, width] in pixels")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} has {len(getattr(self, key))} values and data.channels="
                    f"{self.channels}; give one per channel"
                )
        if not all(0 < std < float("inf") for std in self.std):
            raise ConfigError(f"data.std={self.std} must be positive: images are divided by it")
        if not 0 <= self.shift < min(self.image_size):
            raise ConfigError(f"data.shift={self.shift} must be in [0, {min(self.image_size)}), the image's side")
        for key in ("num_classes", "num_samples"):
            if (getattr(self, key) is None) == (self.source == "synthetic"):
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} with data.source={self.source}: the synthetic source needs it, "
                    f"every other knows its own"
                )
