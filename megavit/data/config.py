"""Settings of the data: source, splits, preprocessing and loading."""

from dataclasses import dataclass, field
from enum import Enum

from megavit.data.augment_config import AugmentConfig
from megavit.data.sources.registry import SOURCES
from megavit.errors import ConfigError
from megavit.plugins import check_name, is_plugin
from megavit.validation import format_value, require_number, suggest


class Interpolation(Enum):
    """Interpolation of resizing."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class OnBadSample(Enum):
    """The action for an image that cannot be read: stop the run, or use another image of its class."""

    stop = "stop"
    skip = "skip"


# Settings that, with the image size, determine the pixels that the network sees.
PIXEL_SETTINGS = ("data.mean", "data.std", "data.crop_pct", "data.interpolation")


@dataclass
class DataConfig(AugmentConfig):
    """Group `data`; settings of random augmentation are in `AugmentConfig`.

    Attributes:
        source: digits; synthetic; folder, a folder per class; csv, lines of path and label; images, without labels;
            tar, WebDataset shards; parquet; arrow, a folder written by datasets' save_to_disk; hub, an id of the
            Hugging Face hub; or package.module:name, a user's source (see docs/extending.md).
        path: the folder, file or id; for csv and tar also a URL, http://… or s3://… for example; null for digits and
            synthetic.
        val_fraction: fraction of each class to validate on, if the path has one set of images; 0 trains on all and does
            not validate. Else null.
        image_size: [height, width] of the network's input, in pixels.
        channels: channels of an image; images are converted to 1 (grey) or 3 (colour); with any other number the files
            must have as many.
        mean: mean of each channel, of values in [0, 1].
        std: standard deviation of each channel, of values in [0, 1].
        classes: names of the classes to keep, in the order of their labels; null keeps all.
        samples_per_class: number of training images to keep of each class; null keeps all.
        fraction: fraction of each class's training images to keep; null keeps all.
        repeats: consecutive views of a training image, each with its own augmentation (repeated augmentation); the
            number of images per epoch does not change.
        multi_label: whether an image may have several labels, or none: in a CSV joined by |, in tables a column of
            lists. For task.loss=bce.
        class_balanced: whether training repeats images so that all classes are equally frequent.
        on_bad_sample: action for an image that cannot be read.
        max_bad_fraction: with skip, fraction of the source's images that may be bad before the run stops; else null.
        num_classes: number of classes of the synthetic source; null for others.
        num_samples: number of training samples of the synthetic source; null for others.
        crop_scale: [smallest, largest] fraction of the image's area in random crops of training images, which are then
            resized; null for no random crop.
        reduced_decode: decode a JPEG at a half, a quarter or an eighth of its scale if the random crop is at least four
            times as high and wide as image_size; false decodes it in full, as evaluation always does.
        flip: mirror training images horizontally with probability 0.5.
        interpolation: interpolation of every resizing, with antialiasing.
        crop_pct: resize images to cover a frame larger than image_size by 1 / crop_pct, and take its centre, both in
            timm's rounding; null resizes the full image, ignoring its proportions. Also for training without
            crop_scale.
        transform: package.module:name of a user's function or torchvision transform, applied to training images after
            crop, flip, auto_augment and color_jitter, uint8 to uint8 of the same shape; null for none.
        random_shift: shift training images by up to this many pixels vertically and horizontally; padding is black.
        workers: number of loader processes; 0 loads in the training process.
        timeout_s: seconds to wait for a micro batch from the loader processes; the error names the images that they
            were reading.
    """

    source: str = "digits"
    path: str | None = None
    val_fraction: float | None = None
    image_size: list[int] = field(default_factory=lambda: [8, 8])
    channels: int = 1
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    classes: list[str] | None = None
    samples_per_class: int | None = None
    fraction: float | None = None
    repeats: int = 1
    multi_label: bool = False
    class_balanced: bool = False
    on_bad_sample: OnBadSample = OnBadSample.stop
    max_bad_fraction: float | None = None
    num_classes: int | None = None
    num_samples: int | None = None
    crop_scale: list[float] | None = None
    reduced_decode: bool = True
    flip: bool = False
    interpolation: Interpolation = Interpolation.bicubic
    crop_pct: float | None = None
    transform: str | None = None
    random_shift: int = 0
    workers: int = 0
    timeout_s: float = 300.0

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        if is_plugin(self.source):
            check_name(self.source, "data.source")
        elif self.source not in SOURCES:
            near = suggest(self.source, SOURCES)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(SOURCES)}, or package.module:name"
            raise ConfigError(f"data.source={self.source} is not known; {hint}")
        if self.transform is not None:
            check_name(self.transform, "data.transform")
        require_number("data", self, "channels", "repeats", at_least=1)
        require_number("data", self, "timeout_s", above=0)
        require_number("data", self, "num_classes", "num_samples", at_least=1)
        require_number("data", self, "workers", at_least=0)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ConfigError(f"data.image_size={self.image_size} must be [height, width] in pixels")
        self._check_path()
        self._check_subset()
        self._check_bad_samples()
        self._check_multi_label()
        self.check_augmentation(self.channels)
        if self.crop_scale is not None and not (
            len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        ):
            raise ConfigError(
                f"data.crop_scale={self.crop_scale} must be [smallest, largest] fraction of the area, in (0, 1]"
            )
        self.check_pixels()
        if not 0 <= self.random_shift < min(self.image_size):
            raise ConfigError(
                f"data.random_shift={self.random_shift} must be in [0, {min(self.image_size)}), the image's side"
            )
        for key in ("num_classes", "num_samples"):
            if not is_plugin(self.source) and (getattr(self, key) is None) == SOURCES[self.source].takes_size:
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} with data.source={self.source}: the synthetic source needs a "
                    f"number, all others need null"
                )

    def check_pixels(self) -> None:
        """Raise ConfigError for invalid `PIXEL_SETTINGS`."""
        require_number("data", self, "crop_pct", above=0, below=1.0000001)
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} has {len(getattr(self, key))} values and data.channels="
                    f"{self.channels}; give one per channel"
                )
        if not all(abs(mean) < float("inf") for mean in self.mean):
            raise ConfigError(f"data.mean={self.mean} must be finite")
        if not all(0 < std < float("inf") for std in self.std):
            raise ConfigError(f"data.std={self.std} must be positive: images are divided by it")

    def _check_path(self) -> None:
        require_number("data", self, "val_fraction", at_least=0, below=1)
        if is_plugin(self.source):
            return
        spec = SOURCES[self.source]
        if spec.takes_path and self.path is None:
            raise ConfigError(f"data.source={self.source} needs data.path=FOLDER, where the images are")
        if spec.takes_path and "://" in str(self.path) and not spec.reads_urls:
            raise ConfigError(
                f"data.path={self.path} is a URL, and data.source={self.source} reads this machine's files; copy them "
                f"here, or pack them as tar shards: data=tar reads remote ones"
            )
        for key in ("path", "val_fraction"):
            if not spec.takes_path and getattr(self, key) is not None:
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} would be ignored by data.source={self.source}; set it to null, "
                    f"or choose data=folder"
                )

    def _check_subset(self) -> None:
        require_number("data", self, "samples_per_class", at_least=1)
        require_number("data", self, "fraction", above=0, below=1.0000001)
        if self.samples_per_class is not None and self.fraction is not None:
            raise ConfigError(
                f"set one of data.samples_per_class={self.samples_per_class} and data.fraction={self.fraction}, "
                f"and the other to null"
            )
        if self.classes is not None and len(set(self.classes)) < max(1, len(self.classes)):
            raise ConfigError(f"data.classes={self.classes} must name at least one class, and each once")

    def _check_bad_samples(self) -> None:
        require_number("data", self, "max_bad_fraction", at_least=0, below=1.0000001)
        skips = self.on_bad_sample is OnBadSample.skip
        if skips and self.max_bad_fraction is None:
            raise ConfigError(
                "data.on_bad_sample=skip needs data.max_bad_fraction, the fraction of images that may be bad before "
                "the run stops: 0.01 for example"
            )
        if not skips and self.max_bad_fraction is not None:
            raise ConfigError(
                f"data.max_bad_fraction={self.max_bad_fraction} would be ignored by data.on_bad_sample="
                f"{self.on_bad_sample.value}; set it to null, or choose skip"
            )

    def _check_multi_label(self) -> None:
        if not self.multi_label:
            return
        if not is_plugin(self.source) and not SOURCES[self.source].multi_label:
            several = [name for name, spec in SOURCES.items() if spec.multi_label]
            raise ConfigError(
                f"data.multi_label=true needs a data.source of {', '.join(several)}, or your own; "
                f"{self.source} has one label for each image"
            )
        parts = {"classes": None, "samples_per_class": None, "fraction": None, "class_balanced": False}
        for key, off in parts.items():
            if getattr(self, key) != off:
                raise ConfigError(
                    f"data.{key}={getattr(self, key)} needs one class per image, and with data.multi_label=true an "
                    f"image may have several; set it to {format_value(off)}"
                )
        if self.on_bad_sample is OnBadSample.skip:
            raise ConfigError(
                "data.on_bad_sample=skip replaces an image by another of its class, and with data.multi_label=true an "
                "image may have several; set it to stop"
            )
