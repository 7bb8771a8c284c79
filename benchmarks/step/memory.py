"""Bytes that a training step needs: what is held between steps, and what is kept for the backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes of distinct storages that a forward pass keeps for its backward pass.

    Args:
        forward: the forward pass; its graph is dropped afterwards.
        held: tensors that are there anyway.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in held}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            # Held, so that no later tensor takes its place.
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    count = sum(storage.nbytes() for storage in storages.values())
    del loss
    return count
