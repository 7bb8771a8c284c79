"""The work of one step: the same images, labels and masks for every candidate, lying on the device.

Shapes: B images, C channels, Y rows, X columns, K kept patches, P patches.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavit.config.experiment import ExperimentConfig
from megavit.data.loader import Batch
from megavit.data.sampler import SampleKey
from megavit.data.transforms.normalize import Normalize


@dataclass(frozen=True)
class Work:
    """What a candidate is given.

    Attributes:
        config: of the run that megavit would train.
        batch: images as they leave a loader, uint8, and labels.
        normalize: what everyone passes the images through.
        device: where all of it lies.
        dtype: of weights and activations; the optimizer's weights are fp32.
    """

    config: ExperimentConfig
    batch: Batch
    normalize: Normalize
    device: torch.device
    dtype: torch.dtype


class Candidate(Protocol):
    """Someone who trains."""

    def step(self, *, alike: bool = False) -> None:
        """One step: gradients of the batch, clipped, into the weights; on everyone's masks where it is to be alike."""
        ...

    def outputs(self) -> tuple[Tensor, float]:
        """What the network makes of the batch now, and the loss; on masks that are everyone's, where there are any."""
        ...

    def forward(self) -> Tensor:
        """The loss of the batch, with its graph, for what is kept for the backward pass to be counted."""
        ...

    def held(self) -> list[Tensor]:
        """Weights, gradients and the optimizer's state, as far as they exist."""
        ...


def draw_batch(config: ExperimentConfig, device: torch.device) -> Batch:
    """Noise of the configured shape, with labels; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    count, data = config.train.global_batch, config.data
    images = torch.randint(0, 256, (count, data.channels, *data.image_size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, data.num_classes or 1, (count,), generator=generator)
    return Batch(
        images.to(device),
        {"labels": labels.to(device)},
        torch.ones(count, dtype=torch.bool, device=device),
        [SampleKey(index, 0) for index in range(count)],
    )


def prepare_work(config: ExperimentConfig, device: torch.device) -> Work:
    """Draw the batch of a row."""
    dtype = torch.bfloat16 if config.train.precision.value == "bf16_o2" else torch.float32
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    return Work(config, draw_batch(config, device), normalize, device, dtype)
