"""Count the bytes of a training step: tensors held between steps, and activations saved for the backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages that a forward pass saves for its backward pass.

    Args:
        forward: the forward pass; its graph is freed afterwards.
        held: tensors that exist in any case and do not count.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in held}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            # Keep a reference, so that no later tensor gets the same address.
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    count = sum(storage.nbytes() for storage in storages.values())
    del loss
    return count
