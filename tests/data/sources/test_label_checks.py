"""Warnings about unusual classes are printed once, one line each."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from megavit.data.sources.label_checks import describe_oddities
from tests.reference import SMALL
from tests.trained import train


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


def test_a_run_reports_classes_that_look_alike_and_classes_without_validation_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    labels = {"train": ["apple", " apple ", "Apple", "1", "001"], "val": ["apple"]}
    for part, names in labels.items():
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *(f"a.png,{name}" for name in names)]) + "\n")
    own = ["data=csv", f"data.path={tmp_path}", "data.workers=0", "data.image_size=[8,8]", "model.patch_size=4"]
    steps = ["train.steps=1", "train.global_batch=4", "train.micro_batch=4", "optim.warmup_steps=0"]
    train([*SMALL, *own, *SMALL[:4], *steps, f"run.dir={tmp_path / 'run'}"])
    warnings = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "warning: " in line]
    (reported,) = [line for line in warnings if " and " in line and "'" in line]
    assert "'Apple' and 'apple'" in reported and "'001'" in reported and "'1'" in reported
    assert any("3 of 4 classes" in line and "have no validation images" in line for line in warnings), warnings
