"""Settings of random augmentation of training images, part of the group `data`."""

from dataclasses import dataclass
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number


class AutoAugment(Enum):
    """The policy that chooses random operations for training images.

    `autoaugment`: one of 25 learned pairs of operations, those of ImageNet (arXiv 1805.09501).
    `randaugment`: `randaugment_ops` of 14 operations at one magnitude (arXiv 1909.13719).
    `trivialaugment`: one operation at a random magnitude (arXiv 2103.10158).
    `three_augment`: greyscale, solarise or blur (arXiv 2204.07118, which adds color_jitter=[0.3,0.3,0.3,0] and flip).
    """

    autoaugment = "autoaugment"
    randaugment = "randaugment"
    trivialaugment = "trivialaugment"
    three_augment = "three_augment"


@dataclass
class AugmentConfig:
    """Part of group `data`.

    Attributes:
        auto_augment: operations applied to training images after crop and flip; null for none.
        randaugment_ops: number of operations that RandAugment samples per image.
        randaugment_magnitude: mean magnitude, from 0 to 10 (the 9 of timm's rand-m9-mstd0.5).
        randaugment_magnitude_std: standard deviation of each operation's magnitude (the 0.5 of rand-m9-mstd0.5).
        randaugment_prob: probability that a sampled operation is applied; timm uses 0.5.
        color_jitter: largest relative change of [brightness, contrast, saturation], and largest shift of the hue as a
            fraction of the colour circle, at most 0.5; applied to training images after auto_augment; null for none.
        random_erasing: probability that a box of 0.02 to 1/3 of a training image's area is replaced by normal noise.
        mixup: alpha of Beta(alpha, alpha), which gives the weight with which a training image and its label are blended
            with its neighbour in the batch; null for no mixup.
        cutmix: alpha of Beta(alpha, alpha), which gives the area of the box that is pasted from the neighbour; null for
            no cutmix.
        mixup_prob: probability that an image is mixed, if mixup or cutmix is set.
        mixup_switch_prob: probability that a mixed image gets cutmix, if both are set.
    """

    auto_augment: AutoAugment | None = None
    randaugment_ops: int = 2
    randaugment_magnitude: float = 9.0
    randaugment_magnitude_std: float = 0.5
    randaugment_prob: float = 1.0
    color_jitter: list[float] | None = None
    random_erasing: float = 0.0
    mixup: float | None = None
    cutmix: float | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5

    @property
    def mixes(self) -> bool:
        """Return whether training images are mixed with each other."""
        return self.mixup is not None or self.cutmix is not None

    def check_augmentation(self, channels: int) -> None:
        """Raise ConfigError for settings that contradict each other or the number of channels."""
        self._check_operations(channels)
        self._check_mixing()

    def _check_operations(self, channels: int) -> None:
        require_number("data", self, "randaugment_ops", at_least=1)
        require_number("data", self, "randaugment_magnitude", at_least=0, below=10.0000001)
        require_number("data", self, "randaugment_magnitude_std", at_least=0)
        require_number("data", self, "randaugment_prob", above=0, below=1.0000001)
        if self.auto_augment is not AutoAugment.randaugment:
            for key in ("ops", "magnitude", "magnitude_std", "prob"):
                self._refuse_unused(f"randaugment_{key}", "data.auto_augment=randaugment")
        jitter, name = self.color_jitter, self.auto_augment and self.auto_augment.value
        if jitter is not None and not (
            len(jitter) == 4 and all(0 <= part < float("inf") for part in jitter) and jitter[3] <= 0.5 and any(jitter)
        ):
            raise ConfigError(
                f"data.color_jitter={jitter} must be [brightness, contrast, saturation, hue], none negative, one above "
                f"0, the hue at most 0.5; set it to null for none"
            )
        for setting in (f"auto_augment={name}" if name else None, f"color_jitter={jitter}" if jitter else None):
            if setting and channels not in (1, 3):
                raise ConfigError(
                    f"data.{setting} is defined for 1 and 3 channels, and data.channels={channels}; set it to null, "
                    f"or use your own function, data.transform=package.module:name"
                )
        if channels == 1 and jitter is not None and any(jitter[2:]):
            raise ConfigError(
                f"data.color_jitter={jitter} changes saturation and hue, and data.channels=1 has neither; set "
                f"data.color_jitter=[{jitter[0]},{jitter[1]},0,0]"
            )
        if channels == 1 and self.auto_augment is AutoAugment.three_augment:
            raise ConfigError(
                "data.auto_augment=three_augment removes the colour of a third of the images, and data.channels=1 has "
                "none; choose randaugment or trivialaugment"
            )

    def _check_mixing(self) -> None:
        require_number("data", self, "random_erasing", "mixup_switch_prob", at_least=0, below=1.0000001)
        require_number("data", self, "mixup", "cutmix", above=0)
        require_number("data", self, "mixup_prob", above=0, below=1.0000001)
        if not self.mixes:
            self._refuse_unused("mixup_prob", "data.mixup or data.cutmix")
        if self.mixup is None or self.cutmix is None:
            self._refuse_unused("mixup_switch_prob", "data.mixup and data.cutmix, between which it chooses")

    def _refuse_unused(self, key: str, needs: str) -> None:
        """Raise ConfigError for a changed setting that would be ignored."""
        value, default = getattr(self, key), getattr(AugmentConfig(), key)
        if value != default:
            raise ConfigError(f"data.{key}={value} would be ignored without {needs}; leave it at {default}")
