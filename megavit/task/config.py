"""What is learned."""

import math
from dataclasses import dataclass, replace
from enum import Enum

from megavit.errors import ConfigError
from megavit.model.config import ModelConfig
from megavit.plugins import check_name
from megavit.validation import format_value, require_number


class TaskName(Enum):
    """Supervised classification; a linear classifier on a frozen encoder; or a masked autoencoder."""

    classify = "classify"
    linear_probe = "linear_probe"
    mae = "mae"

    @property
    def classifies(self) -> bool:
        """Whether its network scores classes."""
        return self is not TaskName.mae


class Loss(Enum):
    """How a classifier's scores are held against the labels.

    `cross_entropy`: of all classes at once, which share one image's probability.
    `bce`: binary cross-entropy of each class by itself, the mean over the classes (arXiv 2110.00476, section 3).
    """

    cross_entropy = "cross_entropy"
    bce = "bce"


_CLASSIFY = ("label_smoothing",)
_CLASSIFY_MAY = ("loss", "class_weights")
_MAE = (
    "mask_ratio",
    "norm_pix_loss",
    "decoder_hidden_size",
    "decoder_ffn_size",
    "decoder_num_heads",
    "decoder_num_layers",
    "baseline_samples",
)

# Width and heads of the decoder of the paper's B, L and H (arXiv 2111.06377), and its layers.
_PAPER_WIDTH, _PAPER_HEADS, _PAPER_LAYERS = 512, 16, 8


@dataclass
class TaskConfig:
    """Group `task`. What belongs to another task is null.

    Attributes:
        name: the task.
        implementation: package.module:name of a class of one's own in its place, called as the task's own class is
            (see docs/extending.md); null for megavit's.
        label_smoothing: probability spread over all classes, in [0, 1); in training alone.
        loss: how scores are held against labels; null is cross_entropy, as in runs from before there was a choice. The
            validation loss has neither label_smoothing nor class_weights.
        class_weights: one per class, in the order of the labels: what each class's part of the loss is multiplied by;
            the loss stays a mean over the images, not over the weights. Null for all 1.
        mask_ratio: share of the patches that the encoder does not see, in (0, 1).
        norm_pix_loss: compare with each patch's pixels less their mean, over their deviation; else with the pixels.
        decoder_hidden_size: the decoder's token width; null takes the encoder's, at most 512.
        decoder_ffn_size: width inside its MLP; null takes the encoder's, or 4 times the decoder's width if that is
            another.
        decoder_num_heads: its attention heads; null takes the encoder's, or at most 16 if the width is another.
        decoder_num_layers: its layers; all of them stand on the last pipeline stage. Null takes a third of the
            encoder's, at most 8.
        baseline_samples: training images that the mean image is measured over, at most.
    """

    name: TaskName = TaskName.classify
    implementation: str | None = None
    label_smoothing: float | None = None
    loss: Loss | None = None
    class_weights: list[float] | None = None
    mask_ratio: float | None = None
    norm_pix_loss: bool | None = None
    decoder_hidden_size: int | None = None
    decoder_ffn_size: int | None = None
    decoder_num_heads: int | None = None
    decoder_num_layers: int | None = None
    baseline_samples: int | None = None

    def num_visible_patches(self, num_patches: int) -> int:
        """Patches that the encoder sees: int(P · (1 − mask_ratio)).

        Raises:
            ConfigError: if that is none or all of them.
        """
        assert self.mask_ratio is not None
        # Rounded first: 1 − 0.9 is a little less than 0.1, and 10 patches of 100 are meant.
        num_visible = int(round(num_patches * (1 - self.mask_ratio), 6))
        if not 0 < num_visible < num_patches:
            raise ConfigError(
                f"task.mask_ratio={self.mask_ratio} keeps {num_visible} of {num_patches} patches: int({num_patches} × "
                f"(1 − {self.mask_ratio})) = {num_visible}; choose a ratio between {1 / num_patches:.4g} and "
                f"{1 - 1 / num_patches:.4g}"
            )
        return num_visible

    def with_decoder(self, model: ModelConfig) -> "TaskConfig":
        """With a masked autoencoder's decoder sizes that are null derived from its encoder; other tasks as they are."""
        if self.name is not TaskName.mae:
            return self
        # Positions by sine and cosine, down and across, need a multiple of 4.
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
        """The decoder as a model group: its own sizes, the encoder's patches, class tokens and kernels."""
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

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        needs, may = (_CLASSIFY, _CLASSIFY_MAY) if self.name.classifies else (_MAE, ())
        for key in (*_CLASSIFY, *_CLASSIFY_MAY, *_MAE):
            value = getattr(self, key)
            if key in needs and value is None:
                raise ConfigError(f"task.name={self.name.value} needs task.{key}; choose task={self.name.value}")
            if key not in (*needs, *may) and value is not None:
                raise ConfigError(
                    f"task.{key}={format_value(value)} would be ignored by task.name={self.name.value}; set it to null"
                )
        if self.implementation is not None:
            check_name(self.implementation, "task.implementation")
        require_number("task", self, "label_smoothing", at_least=0, below=1)
        weights = self.class_weights
        if weights is not None and not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
            raise ConfigError(f"task.class_weights={weights} must be at least 0 each, and one above 0")
        require_number("task", self, "mask_ratio", at_least=0, below=1)
        require_number("task", self, *(key for key in _MAE if key not in ("mask_ratio", "norm_pix_loss")), at_least=1)
        if self.name is TaskName.mae:
            self._check_decoder()

    def _check_decoder(self) -> None:
        assert self.decoder_hidden_size is not None and self.decoder_num_heads is not None
        hidden, heads = self.decoder_hidden_size, self.decoder_num_heads
        if hidden % heads:
            raise ConfigError(
                f"task.decoder_hidden_size={hidden} is not divided by task.decoder_num_heads={heads}: {hidden} mod "
                f"{heads} = {hidden % heads}"
            )
        if hidden % 4:
            raise ConfigError(
                f"task.decoder_hidden_size={hidden} must be a multiple of 4: the decoder's positions are sine and "
                f"cosine, down and across"
            )
