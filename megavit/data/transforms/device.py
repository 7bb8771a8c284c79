"""Preprocess a micro batch on the training device: normalise, erase and mix its images.

Shapes: B images, C channels, Y rows, X columns.
"""

import torch
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.loader import Batch
from megavit.data.transforms.mixup import MixParams, MixupCutmix
from megavit.data.transforms.normalize import Normalize
from megavit.data.transforms.random_erasing import Erasing


class DeviceTransforms:
    """Normalise images; for training also erase boxes in them and mix them.

    Args:
        config: the data group.
        seed: `run.seed`.
        device: the training device.
    """

    def __init__(self, config: DataConfig, *, seed: int, device: torch.device) -> None:
        self.normalize = Normalize(config.mean, config.std).to(device)
        self._erasing = Erasing(config, seed=seed) if config.random_erasing else None
        self._mixing = MixupCutmix(config, seed=seed) if config.mixes else None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the network's input, float32 images_BCYX."""
        assert batch.images_BCYX is not None
        images_BCYX = self.normalize(batch.images_BCYX)
        if self._erasing is not None and batch.augmented:
            images_BCYX = self._erasing(images_BCYX, batch)
        mix = self.mix(batch)
        return images_BCYX if mix is None else mix.images(images_BCYX)

    def mix(self, batch: Batch) -> MixParams | None:
        """Return how the batch is mixed, the same on every rank; None if it is not mixed."""
        return self._mixing.draw(batch) if self._mixing is not None and batch.augmented else None
