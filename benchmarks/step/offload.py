"""Move waiting candidates from the GPU to host memory, because several of the largest networks do not fit together."""

from collections.abc import Mapping

import torch

from benchmarks.step.workload import Candidate


class CpuOffload:
    """Move a candidate's storages to host memory, and back into the same tensors; does nothing on a CPU.

    Args:
        device: device of the candidates.
    """

    def __init__(self, device: torch.device) -> None:
        self._moves = device.type == "cuda"
        self._offloaded: dict[str, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = {}

    def offload(self, candidates: Mapping[str, Candidate]) -> None:
        """Move the candidates that are not offloaded yet to host memory."""
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
        """Free the host copy of a candidate."""
        self._offloaded.pop(name, None)

    def restore(self, name: str) -> None:
        """Copy an offloaded candidate's tensors back to the device."""
        for storage, host_copy in self._offloaded.pop(name, []):
            storage.resize_(host_copy.nbytes())
            storage.copy_(host_copy)
