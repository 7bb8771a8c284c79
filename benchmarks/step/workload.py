"""Prepare the work of one step: the same images, labels and masks on the device for every candidate.

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
    """The input of a candidate.

    Attributes:
        config: settings of megavit's run.
        batch: uint8 images from the loader, and labels.
        normalize: the normalisation that all candidates apply to the images.
        device: device of the batch.
        dtype: number format of weights and activations; the optimizer's weights are fp32.
    """

    config: ExperimentConfig
    batch: Batch
    normalize: Normalize
    device: torch.device
    dtype: torch.dtype


class Candidate(Protocol):
    """A model with its training step."""

    def step(self, *, shared_masks: bool = False) -> None:
        """Run one training step with clipping; `shared_masks` uses the masks that all candidates share."""
        ...

    def outputs(self) -> tuple[Tensor, float]:
        """Return the network's output for the batch and the loss, with the masks that all candidates share."""
        ...

    def forward(self) -> Tensor:
        """Return the loss of the batch with its graph, to count the activations saved for the backward pass."""
        ...

    def held(self) -> list[Tensor]:
        """Return the tensors of weights, gradients and optimizer state that exist."""
        ...


def draw_batch(config: ExperimentConfig, device: torch.device) -> Batch:
    """Return a batch of noise with labels in the configured shape; the same on every rank."""
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
    """Build the input of a row's candidates."""
    dtype = torch.bfloat16 if config.train.precision.value == "bf16_o2" else torch.float32
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    return Work(config, draw_batch(config, device), normalize, device, dtype)
