"""Contestants that wait leave a GPU's memory: the largest networks would not fit beside one another."""

from collections.abc import Mapping

import torch

from benchmarks.step.workload import Candidate


class CpuOffload:
    """What a candidate holds, moved to the host's memory and back to the same tensors. On a CPU nothing moves.

    Args:
        device: whose memory is short.
    """

    def __init__(self, device: torch.device) -> None:
        self._moves = device.type == "cuda"
        self._offloaded: dict[str, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = {}

    def offload(self, candidates: Mapping[str, Candidate]) -> None:
        """Move those that are not parked yet."""
        if not self._moves:
            return
        for name, candidate in candidates.items():
            if name not in self._offloaded:
                storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in candidate.held()}
                self._offloaded[name] = [
                    (storage, torch.UntypedStorage(storage.nbytes()).copy_(storage)) for storage in storages.values()
                ]
                for storage, _ in self._offloaded[name]:
                    storage.resize_(0)
        torch.cuda.empty_cache()

    def discard(self, name: str) -> None:
        """Let go of what is kept of a candidate."""
        self._offloaded.pop(name, None)

    def restore(self, name: str) -> None:
        """Fill a candidate's tensors again, if it was parked."""
        for storage, host_copy in self._offloaded.pop(name, []):
            storage.resize_(host_copy.nbytes())
            storage.copy_(host_copy)
