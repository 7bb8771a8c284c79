"""`megavit fewshot`: scikit-learn's own answer on the rows that the seed says."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from megavit.inference.fewshot import draw_rows
from tests.trained import refusal, run_command, train_small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("fewshot") / "run")


def test_a_draw_takes_as_many_of_each_class_and_depends_on_seed_shots_and_draw_alone():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    rows = draw_rows(labels, 7, seed=3, draw=2)
    assert labels[rows].tolist() == [0] * 7 + [1] * 7 + [2] * 7 + [3] * 7
    assert len(set(rows.tolist())) == 28
    assert np.array_equal(rows, draw_rows(labels, 7, seed=3, draw=2))
    for other in (draw_rows(labels, 7, seed=3, draw=1), draw_rows(labels, 7, seed=2, draw=2)):
        assert not np.array_equal(rows, other)
    every = draw_rows(labels, int(np.bincount(labels).min()), seed=0, draw=0)
    fewest = int(np.bincount(labels).argmin())
    assert sorted(every[labels[every] == fewest]) == np.flatnonzero(labels == fewest).tolist()


def test_it_equals_scikit_learn_on_the_same_rows_and_again_for_the_same_seed(trained, tmp_path):
    command = ["fewshot", f"from={trained}", "shots=2,6", "draws=3", "pool=mean"]
    output = {}
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        code, output[name], err = run_command(*command, f"seed={seed}", f"out={tmp_path / name}.json")
        assert code == 0, err
    first, again, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in output)
    assert first == again
    assert first["results"] != other["results"]
    assert (first["C"], first["pool"], first["val_images"]) == (1.0, "mean", 360)

    assert run_command("features", f"from={trained}", f"out={tmp_path}", "pool=mean")[0] == 0
    train, val = ({key: tensor.numpy() for key, tensor in load_file(tmp_path / f"{split}.safetensors").items()}
                  for split in ("train", "val"))  # fmt: skip
    for row in first["results"]:
        top1 = []
        for draw in range(3):
            rows = draw_rows(train["labels"], row["shots"], seed=7, draw=draw)
            scaler = StandardScaler().fit(train["features"][rows])
            fitted = LogisticRegression(C=1.0, max_iter=1000).fit(
                scaler.transform(train["features"][rows]), train["labels"][rows]
            )
            top1.append(fitted.score(scaler.transform(val["features"]), val["labels"]))
        # Measured: 0; half an image of 360.
        assert row["top1"] == pytest.approx(top1, abs=0.5 / 360)
        assert (row["min"], row["max"]) == (min(row["top1"]), max(row["top1"]))
        assert row["mean"] == pytest.approx(np.mean(top1))
        shown = f"shots={row['shots']}  top1 {row['mean']:.4f}  min {row['min']:.4f}  max {row['max']:.4f}"
        assert shown in output["first"].splitlines()
    assert first["results"][1]["mean"] > first["results"][0]["mean"] > 0.1


def test_wrong_input_leaves_with_2_and_a_way_out(trained, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for name, count in (("ant", 4), ("bee", 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), number).save(tmp_path / split / name / f"{number}.png")
    other = ["data.source=folder", f"data.path={tmp_path}"]
    for arguments, message in (
        (
            ["shots=1,3", *other],
            "shots=3 is more than the 2 training images of class bee (1 of 2 classes of data.source=folder have fewer "
            "than 3); give shots=… of at most 2",
        ),
        (["data.classes=['3']"], "data.source=digits has one class, 3: a classifier needs at least two"),
        (["shots=0"], "shots=0 must be a whole number of at least 1"),
        (["draws=0"], "draws=0 must be a whole number of at least 1"),
        (["seed=-1"], "seed=-1 must be a whole number of at least 0"),
        (["shot=1"], "did you mean shots=?"),
        (["out=x.csv"], "out=x.csv must end in .json"),
        (["data.source=images", f"data.path={tmp_path}"], "data.source=images has no labels: a classifier learns from"),
    ):
        assert message in refusal("fewshot", f"from={trained}", *arguments), arguments
