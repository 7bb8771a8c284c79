"""The masked-autoencoder task: encode a few patches, predict the pixels of the others.

Shapes: B images, C channels, P patches, K kept ones, V = C · patch² values of a patch.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.prefetch import RequiredFields
from megavit.data.transforms.normalize import Normalize
from megavit.metrics.task_metric import TaskMetric
from megavit.model.config import ModelConfig
from megavit.model.layers.patch_embed import patchify, unpatchify
from megavit.model.mae import MaskedAutoencoder
from megavit.model.vit import EncoderStage
from megavit.parallel.activation import ActivationSpec, tokens_boundary
from megavit.parallel.config import ParallelConfig
from megavit.parallel.layout import ParallelLayout
from megavit.task.base import LossFunction, Task, build_model_chunks
from megavit.task.config import MaeConfig
from megavit.task.masking import hidden_mask, random_keep


class MaeTask(Task):
    """Minimise the squared error of the hidden patches' pixels, and report its ratio to that of a constant prediction.

    The constant prediction is the mean target of the training images at each position. A ratio of 1 means that the
    network has learned the mean image and nothing else.

    Args: see `Task`.

    Source: arXiv 2111.06377, sections 3 and 4.1 (normalised targets).
    """

    metric_sums: tuple[str, ...] = ("loss", "baseline", "count")
    reported = (TaskMetric("loss_ratio", "of the mean image's", "loss / loss of the mean image", ".3f", higher=False),)
    image_grid: tuple[str, ...] = ("original", "masked", "reconstruction", "with visible")

    def __init__(
        self,
        config: MaeConfig,
        *,
        model: ModelConfig,
        data: DataConfig,
        num_classes: int,
        layout: ParallelLayout,
        seed: int,
    ) -> None:
        super().__init__(config, model=model, data=data, num_classes=num_classes, layout=layout, seed=seed)
        self.norm_pix_loss, self.baseline_samples = config.norm_pix_loss, config.baseline_samples
        self.decoder = config.decoder(model)
        self.grid = model.patch_grid(data.image_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_kept = config.num_visible_patches(self.num_patches)
        self.normalize = Normalize(data.mean, data.std).to(layout.device)
        # The last stage needs the images too, as the target.
        self.fields = RequiredFields(images=layout.holds_first_stage or layout.holds_last_stage)
        self.mean_PV: Tensor | None = None

    def build_chunks(
        self, mcore_config: TransformerConfig, *, parallel: ParallelConfig, stage_layers: list[int]
    ) -> dict[str, EncoderStage]:
        """Build this rank's stages of the autoencoder (see `Task`)."""
        return build_model_chunks(
            lambda stage: MaskedAutoencoder(
                self.model, self.decoder, mcore_config=mcore_config, layout=self.layout, parallel=parallel, stage=stage
            ),
            parallel=parallel,
            data=self.data,
            stage_layers=stage_layers,
        )

    def boundary(self, micro_batch: int, mcore_config: TransformerConfig) -> ActivationSpec:
        """Return the tensor that one stage sends to the next: class tokens and tokens of the kept patches."""
        tokens = self.num_kept + self.model.class_tokens
        return tokens_boundary(tokens, micro_batch, mcore_config)

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Measure the mean target at each position, on the ranks that compute the loss."""
        if not self.layout.holds_last_stage:
            return
        values = self.data.channels * self.model.patch_size**2
        total = torch.zeros(self.num_patches, values, dtype=torch.float64, device=self.layout.device)
        count = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for batch in batches:
            assert batch.images_BCYX is not None
            target_BPV = self.target(self._patches(batch.images_BCYX)).double()
            total += (target_BPV * batch.counted_B.view(-1, 1, 1)).sum(dim=0)
            count += batch.counted_B.sum()
        for part in (total, count):
            dist.all_reduce(part, group=self.layout.groups.dp)
        self.mean_PV = (total / count).float()

    def keep(self, batch: Batch) -> Tensor:
        """Return keep_BK, the patches that the encoder reads."""
        ids_B, epochs_B, occurrences_B = (
            column.to(self.layout.device, non_blocking=True) for column in batch.key_columns()
        )
        return random_keep(ids_B, epochs_B, occurrences_B, self.num_patches, num_kept=self.num_kept, seed=self.seed)

    def target(self, patches_BPV: Tensor) -> Tensor:
        """Return target_BPV, which the decoder learns to predict, for patches of normalised images."""
        if not self.norm_pix_loss:
            return patches_BPV
        mean, deviation = patch_statistics(patches_BPV)
        return (patches_BPV - mean) / deviation

    def forward(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Map visible patches on the first stage to the pixels of every patch on the last stage."""
        if batch is None or batch.images_BCYX is None:
            return model(None, None), _no_loss
        patches_BPV, ids_keep_BK = self._patches(batch.images_BCYX), self.keep(batch)
        return model(patches_BPV, ids_keep_BK), lambda pixels_BPV: self.loss(
            pixels_BPV, patches_BPV, ids_keep_BK, batch.counted_B
        )

    def loss(
        self, pixels_BPV: Tensor, patches_BPV: Tensor, ids_keep_BK: Tensor, counted_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of hidden patches, and the sums `loss`, `baseline` and `count`.

        `baseline` is the error of the mean image.
        """
        target_BPV = self.target(patches_BPV)
        hidden_BP = hidden_mask(ids_keep_BK, self.num_patches)
        losses_B = _hidden_error(pixels_BPV, target_BPV, hidden_BP)
        assert self.mean_PV is not None, "prepare comes first"
        with torch.no_grad():
            sums = {
                "loss": (losses_B * counted_B).sum(),
                "baseline": (_hidden_error(self.mean_PV, target_BPV, hidden_BP) * counted_B).sum(),
                "count": counted_B.sum().float(),
            }
        return losses_B.mean(), sums

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Return the mean `loss`, and `loss_ratio`, its ratio to the mean image's on the same patches."""
        # If every image equals the mean image, the baseline is 0 and the ratio is not defined.
        ratio = totals["loss"] / totals["baseline"] if totals["baseline"] else math.nan
        return {"loss": totals["loss"] / totals["count"], "loss_ratio": ratio}

    def summary(self, validation: dict[str, float]) -> str:
        """Describe the ratio to the mean image's loss."""
        return f"validation loss {validation['loss_ratio']:.3f} of the mean image's"

    def visualize(self, batch: Batch | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Run `forward`; the loss function returns the pictures of each image as `image_grid`."""
        output, loss = self.forward(batch, model)
        if loss is _no_loss:
            return output, loss
        assert batch is not None and batch.images_BCYX is not None
        images_BCYX, ids_keep_BK = batch.images_BCYX, self.keep(batch)
        return output, lambda pixels_BPV: (
            pixels_BPV.mean(),
            {"image_grid": self.pictures(pixels_BPV, images_BCYX, ids_keep_BK)},
        )

    def pictures(self, pixels_BPV: Tensor, images_BCYX: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Return pictures, uint8 [image, panel, channel, row, column], with the panels of `image_grid`.

        Args:
            pixels_BPV: the decoder's output. With normalised targets it lacks each patch's contrast and brightness,
                which are taken from the original.
            images_BCYX: the original images, uint8.
            ids_keep_BK: int64 indices of the patches that the encoder read.
        """
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(self._patches(images_BCYX))
            pixels_BPV = pixels_BPV * deviation + mean
        guessed = unpatchify(pixels_BPV, self.grid, self.model.patch_size)
        guessed = (self.normalize.undo(guessed).clamp(0, 1) * 255).round().to(torch.uint8)
        hidden_BP1 = hidden_mask(ids_keep_BK, self.num_patches).unsqueeze(2).expand(-1, -1, pixels_BPV.shape[2])
        hidden = unpatchify(hidden_BP1, self.grid, self.model.patch_size)
        grey = torch.full_like(images_BCYX, 127)
        image_grid = [images_BCYX, grey.where(hidden, images_BCYX), guessed, guessed.where(hidden, images_BCYX)]
        return torch.stack(image_grid, dim=1)

    def _patches(self, images_BCYX: Tensor) -> Tensor:
        """Return the patches of uint8 images, normalised."""
        return patchify(self.normalize(images_BCYX), self.model.patch_size)


def patch_statistics(patches_BPV: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch's values (unbiased variance + 1e-6), [images, patches, 1]."""
    mean = patches_BPV.mean(dim=2, keepdim=True)
    return mean, (patches_BPV.var(dim=2, keepdim=True) + 1e-6).sqrt()


def _hidden_error(guess: Tensor, target_BPV: Tensor, hidden_BP: Tensor) -> Tensor:
    """Return errors_B, each image's mean squared error over its hidden patches."""
    errors_BP = (guess - target_BPV).square().mean(dim=2)
    return (errors_BP * hidden_BP).sum(dim=1) / hidden_BP.sum(dim=1)


def _no_loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    raise AssertionError("only the last stage computes the loss")
