"""Measure the device's own rates between the candidates' turns: matrix products and copies."""

import time

import torch

from megavit.model.layers.linear_onednn import onednn_product

# Side of the square matrices, and bytes copied: large enough to reach the device's best rates.
_SIDE = {"cpu": 2048, "cuda": 8192}
_COPIED = {"cpu": 2**28, "cuda": 2**31}
_AT_LEAST_S = 0.3


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Machine:
    """Matrices and buffers on the device with which its rates are measured.

    Args:
        device: the device to measure.
        dtype: number format of the matrices.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, side = device, _SIDE[device.type]
        self._left = torch.randn(side, side, dtype=dtype, device=device)
        self._right = torch.randn(side, side, dtype=dtype, device=device)
        self._out = torch.empty_like(self._left)
        self._from = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)

    def rates(self) -> dict[str, float]:
        """Return `matmul_flops` of a square product by the faster library, and `copy_bytes` read and written, per s."""
        side = self._left.shape[0]
        seconds = self._seconds(lambda: torch.mm(self._left, self._right, out=self._out))
        if self._device.type == "cpu" and torch.backends.mkldnn.is_available():
            seconds = min(seconds, self._seconds(lambda: onednn_product(self._left, self._right)))
        return {
            "matmul_flops": 2 * side**3 / seconds,
            "copy_bytes": 2 * self._from.numel() / self._seconds(lambda: self._to.copy_(self._from)),
        }

    def _seconds(self, work: object) -> float:
        assert callable(work)
        work()
        synchronize(self._device)
        count, start = 0, time.perf_counter()
        while True:
            work()
            count += 1
            synchronize(self._device)
            elapsed = time.perf_counter() - start
            if elapsed > _AT_LEAST_S:
                return elapsed / count
