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
from megavit.parallel.config import Recompute
from megavit.parallel.layout import ParallelLayout
from megavit.task.config import TaskConfig


class Classify:
    """Cross-entropy of the head's scores, and how many of them are right.

    Args:
        config: the task group.
        normalize: images to floats.
        layout: this rank's place.
    """

    # What `loss` adds up.
    sums = ("loss", "top1", "count")

    def __init__(self, config: TaskConfig, *, normalize: Normalize, layout: ParallelLayout) -> None:
        self.config = config
        self.normalize = normalize.to(layout.device)
        self.needs = Needs(images=layout.holds_first_stage, labels=layout.holds_last_stage)

    def build_chunks(
        self,
        config: ModelConfig,
        *,
        block: TransformerConfig,
        layout: ParallelLayout,
        stage_layers: list[int],
        recompute: Recompute,
        image_size: list[int],
        channels: int,
        num_classes: int,
    ) -> list[VisionTransformer]:
        """Build this rank's stages of the network, on the CPU, their weights not drawn yet."""
        return [
            VisionTransformer(
                config,
                block=block,
                layout=layout,
                num_layers=num_layers,
                virtual_stage=virtual_stage,
                recompute=recompute,
                image_size=image_size,
                channels=channels,
                num_classes=num_classes,
            )
            for virtual_stage, num_layers in enumerate(stage_layers)
        ]

    def inputs(self, batch: Batch | None) -> Tensor | None:
        """What the model's forward takes: images on the first stage, nothing on others."""
        if batch is None or batch.images_BCYX is None:
            return None
        return self.normalize(batch.images_BCYX)

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
