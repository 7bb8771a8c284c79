"""Settings of each task, and the properties of a task that are needed before its network is built."""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from megavit.data.config import DataConfig
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Pool
from megavit.optim.config import OptimConfig
from megavit.planner.flops import DecoderShape, NetworkShape
from megavit.plugins import check_name
from megavit.validation import format_value, require_number

# Width, heads and layers of the decoder in the paper (arXiv 2111.06377, B, L and H).
_PAPER_WIDTH, _PAPER_HEADS, _PAPER_LAYERS = 512, 16, 8


@dataclass
class TaskConfig:
    """Group `task`: the settings of all tasks. Each task adds its own in a subclass.

    A subclass overrides the properties and methods in which its task differs. Other modules read these properties, and
    never compare a task's name.

    Attributes:
        name: the task, a row of `megavit/task/registry.py`.
        implementation: package.module:name of your own class, which replaces the task's class and is built with the
            same arguments (see docs/extending.md); null for megavit's.
    """

    name: str = "classify"
    implementation: str | None = None

    @property
    def has_classes(self) -> bool:
        """Return whether the network scores the classes of the data's labels."""
        return False

    @property
    def trains_encoder(self) -> bool:
        """Return whether the encoder is trained; otherwise it is frozen."""
        return True

    @property
    def norms_features(self) -> bool:
        """Return whether a batch norm without weights precedes the classifier."""
        return False

    @property
    def makes_pictures(self) -> bool:
        """Return whether the task makes pictures of images (`Task.visualize`)."""
        return False

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Return prefixes of the parameters behind the encoder, which need not be in the weights of `init_from`."""
        return ()

    @property
    def network_settings(self) -> tuple[str, ...]:
        """Return names of the task's settings on which the shapes of its parameters depend."""
        return ()

    def with_sizes(self, model: ModelConfig) -> Self:
        """Return the settings with sizes that are null derived from the model."""
        return self

    def num_visible_patches(self, num_patches: int) -> int:
        """Return the number of an image's patches that the encoder reads."""
        return num_patches

    def decoder(self, model: ModelConfig) -> ModelConfig | None:
        """Return the decoder as a model group with the sizes `task.decoder_*`; None without a decoder."""
        return None

    def network_shape(
        self, encoder: NetworkShape, *, model: ModelConfig, num_patches: int, num_classes: int
    ) -> NetworkShape:
        """Return the shape of the network, on which its FLOPs depend.

        Args:
            encoder: the encoder's shape, without head or decoder.
            model: the model group.
            num_patches: patches of an image.
            num_classes: classes of the data's labels.
        """
        return encoder

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        if self.implementation is not None:
            check_name(self.implementation, "task.implementation")

    def check_groups(self, *, model: ModelConfig, data: DataConfig, optim: OptimConfig) -> None:
        """Raise ConfigError if another group has a setting that the task would ignore.

        Args:
            model: the model group.
            data: the data group.
            optim: the optimizer's group.
        """
        self._refuse_several_labels(data)
        if not self.has_classes:
            self._refuse_data(data, ("mixup", "cutmix"), why="which has no labels to mix")

    def _refuse_several_labels(self, data: DataConfig) -> None:
        if data.multi_label:
            raise ConfigError(
                "data.multi_label=true needs task.loss=bce, which compares each class separately; for a task without "
                "labels set data.multi_label=false"
            )

    def _refuse_data(self, data: DataConfig, keys: tuple[str, ...], *, why: str) -> None:
        for key in keys:
            if getattr(data, key):
                raise ConfigError(
                    f"data.{key}={getattr(data, key)} would be ignored by task.name={self.name}, {why}; set it to "
                    f"{format_value(getattr(DataConfig(), key))}"
                )


class Loss(Enum):
    """The loss that compares class scores with labels.

    `cross_entropy`: cross-entropy over all classes; an image's probabilities sum to 1.
    `bce`: mean over the classes of each class's binary cross-entropy (arXiv 2110.00476, section 3).
    """

    cross_entropy = "cross_entropy"
    bce = "bce"


@dataclass
class ClassificationConfig(TaskConfig):
    """Supervised classification.

    Attributes:
        label_smoothing: probability that is spread over all classes, in [0, 1), in training only.
        loss: the loss. The validation loss uses neither label_smoothing nor class_weights.
        class_weights: factor of each class's part of the loss, in the order of the labels; the loss stays a mean over
            images, not over weights. Null for all 1.
    """

    name: str = "classify"
    label_smoothing: float = 0.0
    loss: Loss = Loss.cross_entropy
    class_weights: list[float] | None = None

    @property
    def has_classes(self) -> bool:
        """Return True."""
        return True

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Return the prefix of the head."""
        return ("head.",)

    def network_shape(
        self, encoder: NetworkShape, *, model: ModelConfig, num_patches: int, num_classes: int
    ) -> NetworkShape:
        """Return the shape with the head."""
        return replace(encoder, classes=num_classes)

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        super().check()
        require_number("task", self, "label_smoothing", at_least=0, below=1)
        weights = self.class_weights
        if weights is not None and not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
            raise ConfigError(f"task.class_weights={weights} must each be at least 0, and one of them above 0")

    def _refuse_several_labels(self, data: DataConfig) -> None:
        if self.loss is not Loss.bce:
            super()._refuse_several_labels(data)


@dataclass
class LinearProbeConfig(ClassificationConfig):
    """A linear classifier on a frozen encoder; its settings are those of classification."""

    name: str = "linear_probe"

    @property
    def trains_encoder(self) -> bool:
        """Return False."""
        return False

    @property
    def norms_features(self) -> bool:
        """Return True."""
        return True

    def check_groups(self, *, model: ModelConfig, data: DataConfig, optim: OptimConfig) -> None:
        """Raise ConfigError for settings that a frozen encoder ignores, or that add noise to its features."""
        super().check_groups(model=model, data=data, optim=optim)
        dropout = ("hidden_dropout", "attention_dropout", "drop_path")
        for group, settings, defaults, keys, why in (
            ("model", model, ModelConfig(), dropout, "whose frozen encoder drops nothing"),
            ("model", model, ModelConfig(), ("head",), "which trains one matrix"),
            ("optim", optim, OptimConfig(), ("freeze", "layer_decay"), "which freezes the encoder itself"),
        ):
            for key in keys:
                value, wanted = getattr(settings, key), getattr(defaults, key)
                if value != wanted:
                    raise ConfigError(
                        f"{group}.{key}={format_value(value)} does not fit task.name={self.name}, {why}; set it "
                        f"to {format_value(wanted)}"
                    )


@dataclass
class MaeConfig(TaskConfig):
    """A masked autoencoder.

    Attributes:
        mask_ratio: fraction of the patches that the encoder does not read, in (0, 1).
        norm_pix_loss: whether the target is each patch's pixels, normalised by the patch's mean and standard deviation;
            otherwise it is the pixels.
        decoder_hidden_size: the decoder's token width; null takes the encoder's, at most 512.
        decoder_ffn_size: hidden width of the decoder's MLP; null takes the encoder's if both token widths are equal,
            else 4 times the decoder's width.
        decoder_num_heads: attention heads of the decoder; null takes the encoder's if both token widths are equal, else
            at most 16.
        decoder_num_layers: layers of the decoder, all on the last pipeline stage; null takes a third of the encoder's,
            at most 8.
        baseline_samples: largest number of training images from which the mean image is computed.
    """

    name: str = "mae"
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    decoder_hidden_size: int | None = None
    decoder_ffn_size: int | None = None
    decoder_num_heads: int | None = None
    decoder_num_layers: int | None = None
    baseline_samples: int = 4096

    @property
    def makes_pictures(self) -> bool:
        """Return True."""
        return True

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Return the prefix of the decoder."""
        return ("mae_decoder.",)

    @property
    def network_settings(self) -> tuple[str, ...]:
        """Return the names of the decoder's sizes."""
        return ("decoder_hidden_size", "decoder_ffn_size", "decoder_num_heads", "decoder_num_layers")

    def num_visible_patches(self, num_patches: int) -> int:
        """Return the number of patches that the encoder reads: int(P · (1 − mask_ratio)).

        Raises:
            ConfigError: if that is none or all of them.
        """
        # Round first: 1 − 0.9 is a little less than 0.1, and must give 10 of 100 patches.
        num_visible = int(round(num_patches * (1 - self.mask_ratio), 6))
        if not 0 < num_visible < num_patches:
            raise ConfigError(
                f"task.mask_ratio={self.mask_ratio} keeps {num_visible} of {num_patches} patches: int({num_patches} × "
                f"(1 − {self.mask_ratio})) = {num_visible}; choose a ratio between {1 / num_patches:.4g} and "
                f"{1 - 1 / num_patches:.4g}"
            )
        return num_visible

    def with_sizes(self, model: ModelConfig) -> Self:
        """Return the settings with the decoder's sizes that are null derived from the encoder."""
        # Sine-cosine positions of rows and columns need a multiple of 4.
        width = self.decoder_hidden_size or min(_PAPER_WIDTH, model.hidden_size // 4 * 4)
        as_wide = width == model.hidden_size
        heads = model.num_heads if as_wide else math.gcd(_PAPER_HEADS, width)
        return replace(
            self,
            decoder_hidden_size=width,
            decoder_ffn_size=self.decoder_ffn_size or (model.ffn_size if as_wide else 4 * width),
            decoder_num_heads=self.decoder_num_heads or heads,
            decoder_num_layers=self.decoder_num_layers or max(1, min(_PAPER_LAYERS, model.num_layers // 3)),
        )

    def decoder(self, model: ModelConfig) -> ModelConfig:
        """Return the decoder as a model group: its own sizes; patches, class tokens and kernels of the encoder."""
        assert self.decoder_hidden_size is not None and self.decoder_ffn_size is not None
        assert self.decoder_num_heads is not None and self.decoder_num_layers is not None
        return replace(
            model,
            hidden_size=self.decoder_hidden_size,
            ffn_size=self.decoder_ffn_size,
            num_heads=self.decoder_num_heads,
            num_layers=self.decoder_num_layers,
            drop_path=0.0,
            layer_scale=None,
        )

    def network_shape(
        self, encoder: NetworkShape, *, model: ModelConfig, num_patches: int, num_classes: int
    ) -> NetworkShape:
        """Return the shape with the decoder, which reads all patches."""
        decoder = self.decoder(model)
        tokens = num_patches + model.class_tokens
        return replace(
            encoder, decoder=DecoderShape(decoder.hidden_size, decoder.ffn_size, decoder.num_layers, tokens=tokens)
        )

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        super().check()
        require_number("task", self, "mask_ratio", at_least=0, below=1)
        require_number("task", self, *self.network_settings, "baseline_samples", at_least=1)
        self._check_decoder()

    def check_groups(self, *, model: ModelConfig, data: DataConfig, optim: OptimConfig) -> None:
        """Raise ConfigError for settings that change images on the device, and for settings of a classifier."""
        self._refuse_several_labels(data)
        ignored = ("random_erasing", "mixup", "cutmix")
        self._refuse_data(data, ignored, why="which neither erases nor mixes images")
        used = ModelConfig(pool=Pool.cls if model.class_tokens else Pool.mean)
        for key in ("pool", "head", "head_bias", "head_std"):
            if getattr(model, key) != getattr(used, key):
                raise ConfigError(
                    f"model.{key}={format_value(getattr(model, key))} would be ignored by task.name={self.name}, which "
                    f"has no classifier; leave it at {format_value(getattr(used, key))}"
                )

    def _check_decoder(self) -> None:
        assert self.decoder_hidden_size is not None and self.decoder_num_heads is not None
        hidden, heads = self.decoder_hidden_size, self.decoder_num_heads
        if hidden % heads:
            raise ConfigError(
                f"task.decoder_hidden_size={hidden} is not divisible by task.decoder_num_heads={heads}: {hidden} mod "
                f"{heads} = {hidden % heads}"
            )
        if hidden % 4:
            raise ConfigError(
                f"task.decoder_hidden_size={hidden} must be a multiple of 4: the decoder's positions are sines and "
                f"cosines of rows and columns"
            )
