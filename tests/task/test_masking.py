"""Masks hide the stated number of patches, without a pattern, as a function of the key."""

import pytest
import torch

from megavit.task.masking import hidden_mask, random_keep

PATCHES, KEPT = 64, 16


def draw(ids, epochs=0, occurrences=0, *, seed=0, patches=PATCHES, kept=KEPT):
    ids = torch.as_tensor(ids)
    return random_keep(
        ids, torch.zeros_like(ids) + epochs, torch.zeros_like(ids) + occurrences, patches, num_kept=kept, seed=seed
    )


def hidden(*args, **kwargs):
    return hidden_mask(draw(*args, **kwargs), PATCHES).double()


@pytest.mark.parametrize(("patches", "kept"), [(16, 4), (196, 49), (256, 64), (196, 1), (196, 195), (7, 3)])
def test_exactly_k_patches_are_kept_once_and_the_others_hidden(patches, kept):
    keep = draw(torch.arange(500), patches=patches, kept=kept)
    assert keep.shape == (500, kept)
    assert (keep[:, 1:] > keep[:, :-1]).all()
    assert keep.min() >= 0
    assert keep.max() < patches
    mask = hidden_mask(keep, patches)
    assert (mask.sum(dim=1) == patches - kept).all()
    assert not mask.gather(1, keep).any()


def test_every_patch_is_hidden_equally_often():
    n, p = 20_000, 1 - KEPT / PATCHES
    frequency = hidden(torch.arange(n)).mean(dim=0)
    # 64 binomial frequencies: by chance, 4.5 standard deviations are passed once in 2,300 tests; the keys are fixed.
    assert (frequency - p).abs().max() < 4.5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize(
    "other",
    [
        lambda ids: hidden(ids + 1),
        lambda ids: hidden(ids, epochs=1),
        lambda ids: hidden(ids, occurrences=1),
        lambda ids: hidden(ids, seed=1),
        lambda ids: hidden(ids + 2**32),
    ],
    ids=["neighbouring samples", "epochs", "occurrences", "seeds", "samples 2³² apart"],
)
def test_masks_of_different_keys_are_uncorrelated(other):
    ids = torch.arange(20_000)
    first, second = hidden(ids), other(ids)
    p = 1 - KEPT / PATCHES
    correlation = ((first - p) * (second - p)).mean() / (p * (1 - p))
    # 1.28 million pairs, within an image dependent through the fixed count, which narrows the spread.
    assert abs(correlation) < 4.5 / (20_000 * PATCHES) ** 0.5
    per_patch = ((first - p) * (second - p)).mean(dim=0) / (p * (1 - p))
    assert per_patch.abs().max() < 4.5 / 20_000**0.5


def test_neighbouring_patches_of_an_image_are_hidden_independently():
    mask, p = hidden(torch.arange(20_000)), 1 - KEPT / PATCHES
    for distance in (1, 8):
        pairs = (mask[:, distance:] - p) * (mask[:, :-distance] - p)
        # Sampling without replacement makes any two patches correlate by −1 / (P − 1).
        assert abs(pairs.mean() / (p * (1 - p)) + 1 / (PATCHES - 1)) < 4.5 / (20_000 * 56) ** 0.5


def test_a_batch_across_two_epochs_masks_each_image_by_its_epoch():
    ids, epochs = torch.tensor([7, 8, 7, 8]), torch.tensor([3, 3, 4, 4])
    zeros = torch.zeros_like(ids)
    both = random_keep(ids, epochs, zeros, PATCHES, num_kept=KEPT, seed=0)
    assert torch.equal(both[:2], draw(ids[:2], epochs=3))
    assert torch.equal(both[2:], draw(ids[2:], epochs=4))
    assert not torch.equal(both[:2], both[2:])


def test_equal_random_numbers_keep_the_patches_order(monkeypatch):
    from megavit.task import masking

    monkeypatch.setattr(masking, "hash_int64", lambda *parts: torch.tensor([[5, 5, 1, 5, 5, 5]]))
    assert draw([0], patches=6, kept=3).tolist() == [[0, 1, 2]]


def test_the_mask_of_a_key_never_changes():
    # A change here changes the masks of every resumed run: it needs a new schema version of checkpoints.
    assert draw([0, 123456789], epochs=2, patches=16, kept=4).tolist() == [[7, 8, 11, 15], [2, 4, 5, 7]]
