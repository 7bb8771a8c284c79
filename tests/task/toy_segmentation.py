"""A task as docs/extending.md describes it: the class of each pixel, of images of bright rectangles.

Shapes: B images, P patches, H hidden, K classes, V = K · patch² values of a patch, Y rows, X columns.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import torch
import torch.nn.functional as F

from megavit.model.layers.patch_embed import patchify, unpatchify
from megavit.model.vit import EncoderStage
from megavit.task.base import Task, build_model_chunks
from megavit.task.config import TaskConfig
from megavit.task.registry import TASKS, TaskRow
from megavit.validation import require_number


@dataclass
class SegmentConfig(TaskConfig):
    """Settings of the task: the number of pixel classes."""

    name: str = "segment"
    pixel_classes: int = 2

    @property
    def new_parameters(self):
        return ("pixel_head.",)

    @property
    def network_settings(self):
        return ("pixel_classes",)

    def network_shape(self, encoder, *, model, num_patches, num_classes):
        return replace(encoder, classes=num_patches * self.pixel_classes * model.patch_size**2)

    def check(self):
        super().check()
        require_number("task", self, "pixel_classes", at_least=2)


class SegmentNetwork(EncoderStage):
    """Add to one stage of the encoder, on the last stage, a linear layer for each patch's token."""

    def __init__(self, config, *, mcore_config, layout, stage, pixel_classes):
        super().__init__(config, mcore_config=mcore_config, layout=layout, stage=stage, final_norm=True)
        self.config_of_model, self.grid = config, config.patch_grid(stage.image_size)
        self.pixel_head = None
        if self.post_process:
            values = pixel_classes * config.patch_size**2
            self.pixel_head = torch.nn.Linear(config.hidden_size, values, dtype=mcore_config.params_dtype)

    def forward(self, images_BCYX):
        patch_size = self.config_of_model.patch_size
        tokens_BNH = self.encode(None if images_BCYX is None else patchify(images_BCYX, patch_size))
        if self.pixel_head is None:
            return tokens_BNH
        values_BPV = self.pixel_head(tokens_BNH[:, self.config_of_model.class_tokens :]).float()
        return unpatchify(values_BPV, self.grid, patch_size)


class SegmentTask(Task):
    """Minimise the cross-entropy of each pixel's class."""

    targets = ("pixel_class",)

    def build_chunks(self, mcore_config, *, parallel, stage_layers):
        return build_model_chunks(
            lambda stage: SegmentNetwork(
                self.model,
                mcore_config=mcore_config,
                layout=self.layout,
                stage=stage,
                pixel_classes=self.config.pixel_classes,
            ),
            parallel=parallel,
            data=self.data,
            stage_layers=stage_layers,
        )

    def forward(self, batch, model):
        images = None if batch is None or batch.images_BCYX is None else batch.images_BCYX.float() / 255 - 0.5
        return model(images), lambda logits_BKYX: self.loss(logits_BKYX, batch)

    def loss(self, logits_BKYX, batch):
        losses_BYX = F.cross_entropy(logits_BKYX, batch.targets["pixel_class"].long(), reduction="none")
        losses_B = losses_BYX.mean(dim=(1, 2))
        sums = {"loss": (losses_B.detach() * batch.counted_B).sum(), "count": batch.counted_B.sum().float()}
        return losses_B.mean(), sums


class Rectangles:
    """Images of a bright rectangle on noise, with a target that marks the pixels inside."""

    classes = ()
    image_shape = None
    dense_targets = MappingProxyType({"pixel_class": torch.uint8})

    def __init__(self, config, split):
        self.offset = 0 if split == "train" else 1000

    def __len__(self):
        return 96

    def label(self, index):
        return 0

    def image(self, index):
        generator = torch.Generator().manual_seed(self.offset + index)
        noise = torch.randint(0, 100, (1, 16, 16), generator=generator, dtype=torch.uint8)
        return noise + 150 * self.dense_target(index, "pixel_class")

    def dense_target(self, index, name):
        inside = torch.zeros(16, 16, dtype=torch.uint8)
        row, column = index * 7 % 11, index * 5 % 9
        inside[row : row + 5, column : column + 7] = 1
        return inside


ROW = {"segment": TaskRow(SegmentConfig, "tests.task.toy_segmentation:SegmentTask")}


def train(conf_dir: str, overrides: list[str]) -> list[float]:
    """Train with the task as one rank, and return the loss of each step on the first rank."""
    from megavit.config import compose, search_path
    from megavit.config.validate import validate
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    # Restore the table afterwards: the process runs other tests.
    folder = mock.Mock(return_value=Path(conf_dir))
    with (
        mock.patch.dict(TASKS, ROW),
        mock.patch.object(compose, "config_dir", folder),
        mock.patch.object(search_path, "config_dir", folder),
    ):
        config = compose.compose(overrides)
        validate(config, world_size_from_environment())
        Trainer(config).run()
    if os.environ["RANK"] != "0":
        return []
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert any(row["split"] == "val" for row in rows)
    return [row["loss"] for row in rows if row["split"] == "train"]
