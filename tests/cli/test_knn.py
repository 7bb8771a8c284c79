"""`megavit knn`: the serial computation's answer, whatever is computed at once."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megavit.inference.features import Features
from megavit.inference.knn import count_right
from tests.test_mae_parity import MAE
from tests.trained import refusal, run_command, train_small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("knn") / "run")


def count_serially(train: Features, val: Features, k: int, temperature: float) -> tuple[int, int]:
    """One image after the other, in double precision."""
    bank, labels = train.features_IH.double().numpy(), train.labels.numpy()
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    first = among = 0
    for query, label in zip(val.features_IH.double().numpy(), val.labels.tolist(), strict=True):
        similarities = bank @ query / np.linalg.norm(query)
        votes = {}
        for place in np.argsort(-similarities)[:k]:
            votes[labels[place]] = votes.get(labels[place], 0) + np.exp(similarities[place] / temperature)
        guesses = sorted(votes, key=votes.get, reverse=True)[:5]
        first, among = first + (guesses[0] == label), among + (label in guesses)
    return first, among


def blobs(count: int, seed: int) -> Features:
    """Twelve classes that overlap, of uneven sizes."""
    draws = np.random.default_rng(seed)
    labels = np.minimum(draws.geometric(0.2, count) - 1, 11)
    centres = np.random.default_rng(0).normal(size=(12, 6))
    features = centres[labels] + 1.5 * draws.normal(size=(count, 6))
    return Features(torch.from_numpy(features).float(), torch.from_numpy(labels), tuple("abcdefghijkl"))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_equals_the_serial_computation_for_every_k_and_chunk(temperature):
    train, val = blobs(300, 1), blobs(90, 2)
    ks = [1, 3, 20, 300]
    expected = {k: count_serially(train, val, k, temperature) for k in ks}
    # All at once; seven images at a time, which leaves six; one at a time, the bound being less than the bank.
    for numbers_at_once in (2**26, 7 * 300, 10):
        found = count_right(train, val, ks=ks, temperature=temperature, device=CPU, numbers_at_once=numbers_at_once)
        assert found == expected
    # Each k has an answer of its own, else one would do for all.
    assert len(set(expected.values())) == len(ks)


def test_votes_weigh_by_similarity_and_temperature():
    # One neighbour of class b at similarity 1 and two of class a at 0.8: exp(1 / t) against 2 exp(0.8 / t), which are
    # even at t = 0.2 / ln 2 = 0.289. Lengths do not matter.
    far = torch.tensor([0.8, 0.6])
    train = Features(torch.stack([torch.tensor([3.0, 0.0]), far, 5 * far]), torch.tensor([1, 0, 0]), ("a", "b", "c"))

    def right(k: int, temperature: float) -> list[tuple[int, int]]:
        asked = [Features(torch.tensor([[2.0, 0.0]]), torch.tensor([label]), train.classes) for label in range(3)]
        return [count_right(train, val, ks=[k], temperature=temperature, device=CPU)[k] for val in asked]

    assert right(3, 0.28) == [(0, 1), (1, 1), (0, 0)]
    assert right(3, 0.30) == [(1, 1), (0, 1), (0, 0)]
    # exp(1 / 0.008) is more than fp32 holds; exp(-0.2 / 0.008) is a vote still.
    assert right(3, 0.008) == [(0, 1), (1, 1), (0, 0)]
    # Nothing has voted for a or c, and they are not guessed, though there is room among the five.
    assert right(1, 0.28) == [(0, 0), (1, 1), (0, 0)]


def test_the_verb_prints_a_line_for_each_k_and_leaves_json(trained, tmp_path):
    out = tmp_path / "made" / "knn.json"
    code, output, err = run_command(
        "knn", f"from={trained}", "k=20,5", f"out={out}", "temperature=0.1", "data.workers=2"
    )
    assert code == 0, err
    found = json.loads(out.read_text())
    heading, *lines, last = output.splitlines()
    assert last == f"details in {out}"
    assert heading == (
        f"{trained}/checkpoints/step_00000020: 360 validation images against 1,437 training images, pool=cls "
        f"temperature=0.1"
    )
    assert lines == [f"k={row['k']}  top1 {row['top1']:.4f}  top5 {row['top5']:.4f}" for row in found["results"]]
    assert (found["pool"], found["temperature"], found["train_images"], found["val_images"]) == ("cls", 0.1, 1437, 360)
    assert run_command("features", f"from={trained}", f"out={tmp_path}")[0] == 0
    splits = [load_file(tmp_path / f"{split}.safetensors") for split in ("train", "val")]
    features = [Features(split["features"], split["labels"], tuple("0123456789")) for split in splits]
    assert [row["k"] for row in found["results"]] == [20, 5]
    for row in found["results"]:
        top1, top5 = count_serially(*features, row["k"], 0.1)
        # Measured: 0 images; one may have two neighbours as near as fp32 can tell.
        assert row["top1"] * 360 == pytest.approx(top1, abs=1.01)
        assert row["top5"] * 360 == pytest.approx(top5, abs=1.01)
        # Measured: 0.41 and 0.46; chance is 0.1.
        assert row["top1"] > 0.25


def test_a_masked_autoencoder_has_neighbours_too(tmp_path):
    run = train_small(tmp_path / "run", *MAE)
    code, output, err = run_command("knn", f"from={run}", "pool=mean", "k=10")
    assert code == 0, err
    assert "pool=mean" in output
    # Measured: 0.53; chance is 0.1.
    assert float(output.split("top1 ")[1].split()[0]) > 0.25


def test_wrong_input_leaves_with_2_and_a_way_out(trained, tmp_path):
    (tmp_path / "train.csv").write_text("path,label\n")
    for arguments, message in (
        (
            ["k=20,1500"],
            "k=1500 is more than the 1,437 training images of data.source=digits; give k=… of at most 1437",
        ),
        (["k=0"], "k=0 must be a whole number of at least 1"),
        (["k=5,"], "k= must be a whole number of at least 1"),
        (["temperature=0"], "temperature=0 must be a finite number above 0"),
        (["temperature=warm"], "temperature=warm must be a finite number above 0"),
        (["temprature=1"], "did you mean temperature=?"),
        (["out=knn.csv"], "out=knn.csv must end in .json"),
        (
            ["data.source=csv", f"data.path={tmp_path}", "data.multi_label=true", "task.loss=bce"],
            "data.multi_label=true: nearest neighbours vote with one label of each image",
        ),
    ):
        assert message in refusal("knn", f"from={trained}", *arguments), arguments


def test_images_without_labels_are_refused_with_the_way_out(trained, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / split / "0.png")
    message = refusal("knn", f"from={trained}", "k=1", "data.source=images", f"data.path={tmp_path}")
    assert "data.source=images has no labels: nearest neighbours vote with one label of each image" in message
    assert "data.source=folder data.path=LABELLED" in message
