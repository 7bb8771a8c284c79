"""Compute the features of a split's images with a trained encoder.

Shapes: B images of a micro batch, I images of a split, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavit.checkpoint.find import CheckpointRef
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_micro_batch
from megavit.data.bad_samples import BadSampleTracker
from megavit.data.config import DataConfig
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources.base import Source
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError, printable
from megavit.inference.load import open_encoder
from megavit.model.config import Pool


@dataclass(frozen=True)
class Features:
    """The features of one split, on the CPU and in the dataset's order.

    Attributes:
        features_IH: fp32 features.
        labels: int64 labels_I, or bool labels_IK with `data.multi_label`; None if the data has no labels.
        classes: class names, in label order.
    """

    features_IH: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]


class FeatureExtractor:
    """Compute features with a run's encoder and preprocessing, on the GPU if there is one.

    Args:
        config: the run's configuration with the command line's settings.
        weights: the checkpoint to load.
        pool: how tokens become one vector; None pools as the head does.

    Attributes:
        device: the encoder's device.
        pool: the pooling in use.
        about: the checkpoint, data and pooling, to be stored with results.
    """

    def __init__(self, config: ExperimentConfig, weights: CheckpointRef, pool: Pool | None) -> None:
        self._config, self._run_dir = config, weights.checkpoint.parent.parent
        encoder, self._layout = open_encoder(config, weights)
        self.device = self._layout.device
        self._encoder = encoder.to(self.device)
        self.pool = pool or encoder.pool
        data = config.data
        self.about: dict[str, Any] = {
            "checkpoint": str(weights),
            "data.source": data.source,
            "data.path": data.path if data.path is None else printable(data.path),
            "pool": self.pool.value,
        }

    @torch.no_grad()
    def extract(self, source: Source, split: str) -> Features:
        """Compute the features of every image of a source, preprocessed as in an evaluation.

        Only the features stay in memory.

        Args:
            source: the opened split.
            split: `train` or `val`, for messages about unreadable images.

        Raises:
            ConfigError: if an image cannot be read and `data.on_bad_sample` is stop.
        """
        config, size = self._config, resolve_micro_batch(self._config, 1)
        labelled = bool(source.classes)
        loader = Loader(
            source,
            config.data,
            layout=self._layout,
            fields=RequiredFields(images=True, targets=("labels",) if labelled else ()),
            micro_batch=size,
            seed=config.run.seed,
            train=False,
        )
        features_IH = torch.empty(len(source), config.model.hidden_size)
        labels = []
        for first, batch in zip(range(0, len(source), size), loader.evaluation_batches(), strict=True):
            assert batch.images_BCYX is not None
            # The last micro batch is padded with images that are not counted.
            count = min(size, len(source) - first)
            features_BH = self._encoder.features(batch.images_BCYX, pool=self.pool)
            features_IH[first : first + count] = features_BH[:count].cpu()
            if "labels" in batch.targets:
                labels.append(batch.targets["labels"][:count].cpu())
        bad_samples = BadSampleTracker(loader, split, run_dir=self._run_dir)
        for line in bad_samples.collect(0):
            print(line)
        if bad_samples.too_many is not None:
            raise ConfigError(bad_samples.too_many)
        if not labelled:
            return Features(features_IH, None, ())
        all_labels = torch.cat(labels)
        return Features(features_IH, all_labels.bool() if config.data.multi_label else all_labels, source.classes)


def open_labelled(data: DataConfig, *, why: str) -> tuple[Source, Source]:
    """Open the training and the validation split of data with one label per image.

    Args:
        data: the data group.
        why: subject and verb of the error, such as "nearest neighbours vote with".

    Raises:
        ConfigError: if the data do not exist, or their images do not have one label each.
    """
    if data.multi_label:
        raise ConfigError(
            f"data.multi_label=true: {why} one label of each image; choose data with one and data.multi_label=false, "
            f"or write the features: megavit features"
        )
    training, validation = open_source(data, "train"), open_source(data, "val")
    if not training.classes:
        raise ConfigError(
            f"data.source={data.source} has no labels: {why} one label of each image; choose data that has them: "
            f"data.source=folder data.path=LABELLED"
        )
    if training.classes != validation.classes:
        raise ConfigError(
            f"the training images of data.source={data.source} have {len(training.classes)} classes and the validation "
            f"images {len(validation.classes)}, or other names; both must have the same"
        )
    return training, validation
