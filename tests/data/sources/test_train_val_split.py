"""The words that name splits: one table for folders, tars and tables."""

import pytest

from megavit.data.sources.train_val_split import find_splits, parts_by_name

SPLITS = {
    ("train", "val"): ("train", "val"),
    ("Train", "Val"): ("Train", "Val"),
    ("TRAIN", "TEST"): ("TRAIN", "TEST"),
    ("training", "validation", "test"): ("training", "validation"),
    ("train", "val", "valid", "apple"): ("train", "val"),
    ("train", "valid", "validation"): None,
    ("Train", "training", "val"): None,
    ("train", "apple"): None,
    ("val", "test"): None,
    ("apple", "lime"): None,
}


@pytest.mark.parametrize("names", SPLITS)
def test_two_names_are_the_splits_where_that_is_unambiguous(names):
    found = find_splits(names)
    assert (found and (found["train"], found["val"])) == SPLITS[names]


FILES = {
    ("a-train-0.tar", "a-test-0.tar", "a-val-0.tar"): (["a-train-0.tar"], ["a-val-0.tar"]),
    ("Training01.tar", "Testing01.tar"): (["Training01.tar"], ["Testing01.tar"]),
    ("x_trainset.parquet", "x_valset.parquet"): (["x_trainset.parquet"], ["x_valset.parquet"]),
    # Letters within a longer word do not count.
    ("retrieval-train.tar", "retrieval-test.tar"): (["retrieval-train.tar"], ["retrieval-test.tar"]),
    ("retrieval-0.tar", "constrained-0.tar"): None,
    ("s3://b/train/x-0.tar", "s3://b/train/x-1.tar"): None,
}


@pytest.mark.parametrize("names", FILES)
def test_words_in_file_names_determine_their_split(names):
    found = parts_by_name(names)
    assert (found and (found["train"], found["val"])) == FILES[names]
