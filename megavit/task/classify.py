"""Supervised classification.

Shapes: B images, K classes.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.data.loader import Batch, Needs
from megavit.data.transforms import Normalize
from megavit.model.config import ModelConfig
from megavit.model.vit import VisionTransformer
from megavit.parallel.layout import ParallelLayout
from megavit.task.config import TaskConfig


class Classify:
    """Cross-entropy of the head's scores, and how many of them are right.

    Args:
        config: the task group.
        normalize: images to floats.
        layout: this rank's place.
    """

    def __init__(self, config: TaskConfig, *, normalize: Normalize, layout: ParallelLayout) -> None:
        self.config = config
        self.normalize = normalize.to(layout.device)
        self.needs = Needs(images=layout.is_first_stage, labels=layout.is_last_stage)

    def build_model(
        self,
        config: ModelConfig,
        *,
        block: TransformerConfig,
        layout: ParallelLayout,
        stages: list[int],
        image_size: list[int],
        channels: int,
        num_classes: int,
    ) -> VisionTransformer:
        """Build this stage of the network, on the CPU, its weights not drawn yet."""
        return VisionTransformer(
            config,
            block=block,
            layout=layout,
            stages=stages,
            image_size=image_size,
            channels=channels,
            num_classes=num_classes,
        )

    def inputs(self, batch: Batch) -> Tensor | None:
        """What the model's forward takes on this stage."""
        return None if batch.images_BCYX is None else self.normalize(batch.images_BCYX)

    def loss(self, logits_BK: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro batch, for the gradient, and sums over its counted images, for the metrics.

        Returns:
            The loss, and sums `loss`, `top1` and `count`; dividing by `count` is left to whoever has added them all.
        """
        assert batch.labels_B is not None
        losses_B = F.cross_entropy(
            logits_BK, batch.labels_B, label_smoothing=self.config.label_smoothing, reduction="none"
        )
        with torch.no_grad():
            counted_B = batch.counted_B
            sums = {
                "loss": (losses_B * counted_B).sum(),
                "top1": ((logits_BK.argmax(dim=1) == batch.labels_B) & counted_B).sum().float(),
                "count": counted_B.sum().float(),
            }
        return losses_B.mean(), sums
