"""Erasing and mixing on a GPU: the CPU's draws, and nothing that makes the host wait. Not run yet."""

import os

import pytest
import torch

from megavit.config.compose import compose
from megavit.data.loader import Batch
from megavit.data.sampler import SampleKey
from megavit.data.transforms.device import DeviceTransforms
from megavit.parallel.rng import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("MEGAVIT_DEVICE") == "cpu", reason="MEGAVIT_DEVICE=cpu; run make test-gpu"),
]


def test_noise_has_the_same_bits_on_both_devices():
    numbers = torch.arange(100_000)
    assert torch.equal(normal(0, 3, numbers.cuda(), 7, 1).cpu(), normal(0, 3, numbers, 7, 1))


def test_a_micro_batch_is_erased_and_mixed_alike_and_without_waiting():
    keys = [SampleKey(number, 1) for number in range(64)]
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    config = compose(
        ["data=cifar10", "data.path=/data", "data.random_erasing=0.5", "data.mixup=0.8", "data.cutmix=1"]
    ).data
    seen = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        batch = Batch(images.to(device), {}, torch.ones(64, dtype=torch.bool, device=device), keys, augmented=True)
        transforms = DeviceTransforms(config, seed=0, device=device)
        transforms(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = transforms(batch)
            mixed = transforms.mix(batch).targets(torch.eye(64, device=device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append((result.cpu(), mixed.cpu()))
    (here, shares), (there, theirs) = seen
    assert torch.equal(shares, theirs)
    # A GPU divides by a number as it multiplies by its inverse: the last bit of a normalised value may differ.
    assert (here - there).abs().max() <= 1e-6
