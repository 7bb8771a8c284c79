"""The classification task: train a classifier, or a linear probe on a frozen encoder (arXiv 2111.06377, section A.1).

Shapes: B images, K classes.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.prefetch import LABELS
from megavit.data.transforms.device import DeviceTransforms
from megavit.errors import ConfigError
from megavit.metrics.task_metric import TaskMetric
from megavit.model.config import ModelConfig
from megavit.model.vit import EncoderStage, VisionTransformer
from megavit.parallel.config import ParallelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.task.base import LossFunction, Task, build_model_chunks
from megavit.task.config import ClassificationConfig, Loss

_TOP1 = TaskMetric("top1", "top-1", "top-1 accuracy", ".4f", higher=True)
_HIT1 = TaskMetric("hit1", "top prediction correct", "top prediction is a label", ".4f", higher=True)


class ClassificationTask(Task):
    """Minimise the cross-entropy of the class scores, or each class's binary cross-entropy, and report the accuracy.

    Args: see `Task`.

    Raises:
        ConfigError: if the number of class weights is not the number of classes.
    """

    targets = (LABELS,)

    def __init__(
        self,
        config: ClassificationConfig,
        *,
        model: ModelConfig,
        data: DataConfig,
        num_classes: int,
        layout: ParallelLayout,
        seed: int,
    ) -> None:
        super().__init__(config, model=model, data=data, num_classes=num_classes, layout=layout, seed=seed)
        self.norms_features = config.norms_features
        self.label_smoothing, self.by_class = config.label_smoothing, config.loss is Loss.bce
        self.weights_K = _class_weights(config, data, num_classes, layout)
        self.preprocess = DeviceTransforms(data, seed=seed, device=layout.device)
        # With several labels per image, a hit means that the best score, or one of the best five, is of one of them.
        self.hits = ("hit1", "hit5") if data.multi_label else ("top1", "top5")
        self.metric_sums, self.reported = ("loss", self.hits[0], "count"), (_HIT1 if data.multi_label else _TOP1,)
        self.metric_shapes = dict.fromkeys(("loss", *self.hits, "count"), ())
        if not data.multi_label:
            self.metric_shapes = {**self.metric_shapes, "confusion": (num_classes, num_classes)}

    def build_chunks(
        self, mcore_config: TransformerConfig, *, parallel: ParallelConfig, stage_layers: list[int]
    ) -> dict[str, EncoderStage]:
        """Build this rank's stages of the classifier (see `Task`)."""
        return build_model_chunks(
            lambda stage: VisionTransformer(
                self.model,
                mcore_config=mcore_config,
                layout=self.layout,
                stage=stage,
                num_classes=self.num_classes,
                norms_features=self.norms_features,
            ),
            parallel=parallel,
            data=self.data,
            stage_layers=stage_layers,
        )

    def forward(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Map images on the first stage to class scores on the last stage."""
        images = None if batch is None or batch.images_BCYX is None else self.preprocess(batch)
        return model(images), lambda logits_BK: self.loss(logits_BK, batch)

    def loss(self, logits_BK: Tensor, batch: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a micro batch, for the gradient, and sums over its counted images, for the metrics.

        Label smoothing and class weights are for training; an evaluation's loss has neither, as in timm, DeiT and MAE.

        Returns:
            The loss, and the sums `loss`, `top1` and `count`; `metrics` divides the totals by `count`. The correct
            class of a mixed image is the one with the larger weight. With several labels each of them is correct, and
            the sum is named `hit1`, because top-1 means one label.
        """
        assert batch is not None
        labels_B, mix = batch.targets[LABELS], self.preprocess.mix(batch)
        shares_BK = labels_B.float() if self.data.multi_label else None
        if mix is not None:
            one_hot_BK = shares_BK if shares_BK is not None else F.one_hot(labels_B, self.num_classes).float()
            shares_BK = mix.targets(one_hot_BK)
            labels_B = labels_B if self.data.multi_label else shares_BK.argmax(dim=1)
        losses_B = self._losses(logits_BK, labels_B, shares_BK, trains=batch.augmented)
        with torch.no_grad():
            counted_B = batch.counted_B
            sums = {
                "loss": (losses_B * counted_B).sum(),
                self.hits[0]: (self._are_right(logits_BK, labels_B, best=1) & counted_B).sum().float(),
                "count": counted_B.sum().float(),
            }
        return losses_B.mean(), sums

    def _losses(self, logits_BK: Tensor, labels_B: Tensor, shares_BK: Tensor | None, *, trains: bool) -> Tensor:
        """Return each image's loss; class probabilities, if not None, replace the labels."""
        smoothing, weights_K = (self.label_smoothing, self.weights_K) if trains else (0.0, None)
        if not self.by_class:
            return F.cross_entropy(
                logits_BK,
                labels_B if shares_BK is None else shares_BK,
                weight=weights_K,
                label_smoothing=smoothing,
                reduction="none",
            )
        if shares_BK is None:
            shares_BK = F.one_hot(labels_B, self.num_classes).float()
        smooth_BK = shares_BK * (1 - smoothing) + smoothing / self.num_classes
        losses_BK = F.binary_cross_entropy_with_logits(logits_BK, smooth_BK, weight=weights_K, reduction="none")
        return losses_BK.mean(dim=1)

    def _are_right(self, logits_BK: Tensor, labels_B: Tensor, *, best: int) -> Tensor:
        """Return for each image whether one of its best scores belongs to one of its labels."""
        if best == 1:
            # argmax, as for the confusion matrix: of equal scores topk may choose another.
            guesses = logits_BK.argmax(dim=1, keepdim=True)
        else:
            guesses = logits_BK.topk(min(best, self.num_classes), dim=1).indices
        if self.data.multi_label:
            return labels_B.gather(1, guesses).any(dim=1)
        return (guesses == labels_B.unsqueeze(1)).any(dim=1)

    def evaluate_sums(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Add the sums `top5` or `hit5`, and for single labels `confusion`, images by [label, prediction]."""
        output, _ = self.forward(batch, model)
        return output, lambda logits_BK: self._scores(logits_BK, batch)

    def _scores(self, logits_BK: Tensor, batch: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = self.loss(logits_BK, batch)
        assert batch is not None
        counted_B, labels_B, classes = batch.counted_B, batch.targets[LABELS], self.num_classes
        among_B = self._are_right(logits_BK, labels_B, best=5)
        sums[self.hits[1]] = (among_B & counted_B).sum().float()
        if self.data.multi_label:
            return loss, sums
        cells = (labels_B * classes + logits_BK.argmax(dim=1))[counted_B]
        confusion = torch.bincount(cells, minlength=classes * classes).view(classes, classes)
        return loss, {**sums, "confusion": confusion}

    def summary(self, validation: dict[str, float]) -> str:
        """Describe top-1, or with several labels the fraction of images whose best score is of one of them."""
        name = "top prediction correct" if self.data.multi_label else "top-1"
        return f"validation {name} {validation[self.hits[0]]:.4f}"


def _class_weights(
    config: ClassificationConfig, data: DataConfig, num_classes: int, layout: ParallelLayout
) -> Tensor | None:
    weights = config.class_weights
    if weights is None:
        return None
    if len(weights) != num_classes:
        raise ConfigError(
            f"task.class_weights has {len(weights)} values and data.source={data.source} has {num_classes} classes: "
            f"give one for each class, in the order of the labels"
        )
    return torch.tensor(weights, device=layout.device)
