"""Subsets: the chosen classes and samples, their labels, and that a larger fraction contains a smaller one."""

import numpy as np
import pytest
import torch

from megavit.config.compose import compose
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError


def source(*overrides: str, split: str = "train"):
    config = compose(list(overrides)).data
    config.check()
    return open_source(config, split)


def labels(of) -> np.ndarray:
    return np.array([of.label(index) for index in range(len(of))])


def pictures(of) -> list[bytes]:
    return [of.image(index).numpy().tobytes() for index in range(len(of))]


def test_chosen_classes_take_the_labels_of_their_place_in_both_splits():
    for split in ("train", "val"):
        full, part = source(split=split), source("data.classes=['7','2']", split=split)
        assert part.classes == ("7", "2")
        assert np.bincount(labels(part)).tolist() == [(labels(full) == 7).sum(), (labels(full) == 2).sum()]
        sevens = [full.image(i) for i in range(len(full)) if full.label(i) == 7]
        kept = [part.image(i) for i in range(len(part)) if part.label(i) == 0]
        assert all(torch.equal(one, other) for one, other in zip(sevens, kept, strict=True))


def test_samples_per_class_and_fraction_reduce_only_training():
    assert np.bincount(labels(source("data.samples_per_class=5"))).tolist() == [5] * 10
    full = np.bincount(labels(source()))
    tenth = np.bincount(labels(source("data.fraction=0.1")))
    assert tenth.tolist() == [round(count * 0.1) for count in full]
    assert len(source("data.fraction=0.1", split="val")) == 360


def test_a_larger_fraction_contains_every_smaller_one_whatever_the_other_classes():
    small, large = source("data.samples_per_class=5"), source("data.samples_per_class=20")
    assert set(pictures(small)) <= set(pictures(large))
    alone = source("data.samples_per_class=5", "data.classes=['3']")
    among = [picture for picture, label in zip(pictures(small), labels(small), strict=True) if label == 3]
    assert pictures(alone) == among


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.classes=['seven']"], "seven is no class of data.source=digits; its first classes are 0, 1, 2"),
        (["data.classes=[]"], "must name at least one class"),
        (["data.classes=['1','1']"], "each once"),
        (
            ["data.samples_per_class=1000"],
            r"data.samples_per_class=1000 is more than the \d+ training images of class 0",
        ),
        (
            ["data.samples_per_class=5", "data.fraction=0.5"],
            "set one of data.samples_per_class=5 and data.fraction=0.5",
        ),
        (["data.fraction=1.5"], "data.fraction=1.5 must be"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_chosen_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        source(*overrides)
