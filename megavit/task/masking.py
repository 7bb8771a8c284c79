"""Choose the patches that a masked autoencoder hides.

Shapes: B images, P patches, K kept ones.
"""

import torch
from torch import Tensor

from megavit.parallel.rng import RandomStream, hash_int64


def random_keep(
    sample_ids_B: Tensor, epochs_B: Tensor, occurrences_B: Tensor, num_patches: int, *, num_kept: int, seed: int
) -> Tensor:
    """Choose, per image, the patches that the encoder reads.

    The choice is a pure function of the arguments, on any device: ranks agree without communication, recompute gives
    the same patches, and resume is exact. Each patch gets 64 random bits; the patches with the lowest numbers are kept,
    ties in the patches' order.

    Args:
        sample_ids_B: int64 indices of the samples in the dataset.
        epochs_B: int64 epoch of each sample (a batch may span two).
        occurrences_B: int64 index of the sample's view within its epoch.
        num_patches: patches per image, class tokens excluded.
        num_kept: number K of patches that the encoder reads.
        seed: `run.seed`.

    Returns:
        ids_keep_BK: int64 indices of the kept patches, ascending.

    Source: arXiv 2111.06377, section 3.
    """
    keys = (part.unsqueeze(1) for part in (epochs_B, sample_ids_B, occurrences_B))
    patches = torch.arange(num_patches, device=sample_ids_B.device)
    draws_BP = hash_int64(seed, *keys, RandomStream.MASK, patches)
    return draws_BP.argsort(dim=1, stable=True)[:, :num_kept].sort(dim=1).values


def hidden_mask(ids_keep_BK: Tensor, num_patches: int) -> Tensor:
    """Return hidden_BP, bool, True for patches that are not kept, which the loss counts.

    Args:
        ids_keep_BK: int64 indices of the kept patches.
        num_patches: patches per image.
    """
    everything = torch.ones(ids_keep_BK.shape[0], num_patches, dtype=torch.bool, device=ids_keep_BK.device)
    return everything.scatter(1, ids_keep_BK, False)
