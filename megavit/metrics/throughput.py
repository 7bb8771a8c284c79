"""Measure speed and memory: images per second, model FLOP utilisation (MFU), peak bytes and the wait for data."""

import resource
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

# Dense bf16 peak in FLOP/s, from NVIDIA's datasheets (the sparse figures are twice these).
_PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s; None if it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return a device's dense bf16 peak in FLOP/s by its name; None if it is not known."""
    return next((peak for key, peak in _PEAK_BF16.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return this rank's peak memory in bytes: on the GPU, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Measure the speed since the last report; the time between `pause` and `resume` does not count.

    Args:
        flops_per_image: model FLOPs of a training step for one image, without recomputed ones.
        num_devices: number of devices that share the work.
        device: device whose peak the MFU refers to.
    """

    def __init__(self, *, flops_per_image: int, num_devices: int, device: torch.device) -> None:
        self._flops_per_image, self._num_devices = flops_per_image, num_devices
        self._peak = peak_flops(device)
        self._images = 0
        self._data_s = 0.0
        self._started = time.perf_counter()
        self._paused_at: float | None = None

    def count(self, images: int) -> None:
        """Add the number of images that all ranks together have trained on."""
        self._images += images

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches and measure the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_s += time.perf_counter() - start
            yield batch

    def pause(self) -> None:
        """Stop the clock, for an evaluation or a save."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Restart the clock."""
        assert self._paused_at is not None
        self._started += time.perf_counter() - self._paused_at
        self._paused_at = None

    def report(self) -> dict[str, float]:
        """Return `images_per_s`, `data_s` (this rank's wait for data) and, if the peak is known, `mfu`; then reset."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        rate = self._images / elapsed
        values = {"images_per_s": rate, "data_s": self._data_s}
        if self._peak is not None:
            values["mfu"] = rate * self._flops_per_image / (self._num_devices * self._peak)
        self._images, self._data_s, self._started = 0, 0.0, time.perf_counter()
        return values
