"""Warnings about unusual classes are printed once, one line each."""

from types import SimpleNamespace

import numpy as np

from megavit.data.sources.label_checks import describe_oddities


def source(classes, counts=None):
    made = SimpleNamespace(classes=tuple(classes))
    if counts is not None:
        made.label_counts = lambda: np.array(counts)
    return made


def oddities(train, val=None) -> list[str]:
    return list(describe_oddities({"train": train} if val is None else {"train": train, "val": val}))


def test_no_warning_for_usual_classes_nor_for_sources_that_cannot_count():
    assert not oddities(source(["a", "b"], [2, 3]), source(["a", "b"], [1, 1]))
    assert not oddities(source(["a", "b"]), source(["a", "b"]))
    assert not oddities(source([], []), source([], []))


def test_classes_without_images_are_named():
    (line,) = oddities(source(["a", "b", "c"], [1, 1, 1]), source(["a", "b", "c"], [1, 0, 0]))
    assert line.startswith("warning: 2 of 3 classes, b, c, have no validation images")
    (line,) = oddities(source(["0", "1", "2"], [0, 5, 5]), source(["0", "1", "2"], [0, 1, 1]))
    assert "1 of 3 classes, 0, has no training images: labels are numbers, and each from 0 to 2 is a class" in line
    counts = np.zeros(1001, int)
    counts[[0, 500, 1000]] = 1
    (line,) = oddities(source(map(str, range(1001)), counts))
    assert "998 of 1,001 classes, 1, 2, 3, 4, 5 and 993 more, have no training images" in line


def test_names_that_differ_in_blanks_case_or_leading_zeros_alone_are_reported_once():
    (line,) = oddities(source(["Apple", "apple", "1", "001", "10", "sky ", "sky", "class_01", "class_1"]))
    assert "'Apple' and 'apple', '1' and '001', 'sky ' and 'sky', 'class_01' and 'class_1'" in line
