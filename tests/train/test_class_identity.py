"""A class is its name: evaluation and resume go by the names of the checkpoint's classes, never by their position."""

import colorsys
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_num_steps
from megavit.config.settings import run_types
from megavit.train.resume_rules import RULES
from tests.trained import refusal, run_command, train

TWELVE = [str(number) for number in range(12)]
KEYS = [
    *("model.hidden_size=32", "model.ffn_size=64", "model.num_heads=2", "model.num_layers=2", "model.patch_size=8"),
    *("data.image_size=[32,32]", "data.workers=0", "data.crop_scale=null", "data.flip=false"),
    *("train.global_batch=32", "optim.lr=3e-3", "metrics.tensorboard=false", "run.preflight=false"),
]


def write_images(folder, names, *, each=8):
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        noise = np.random.default_rng(place)
        colour = np.array(colorsys.hsv_to_rgb(place / len(names), 1, 0.8)) * 255
        for number in range(each):
            pixels = np.clip(colour + noise.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A classifier of twelve colours, whose classes a CSV sorts as numbers and folders sort as text."""
    root = tmp_path_factory.mktemp("numbered")
    write_images(root / "images", TWELVE)
    with (root / "images" / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows([f"{name}/{number}.png", name] for name in TWELVE for number in range(8))
    source = ["data=csv", f"data.path={root}/images/list.csv", "data.val_fraction=0.25"]
    train([*source, *KEYS, "train.steps=60", f"run.dir={root}/run"])
    return root


def metrics_of(root, *settings):
    code, said, err = run_command("evaluate", f"from={root}/run", *settings)
    assert code == 0, err
    folder = said.rpartition("; details in ")[2].removesuffix("\n")
    return folder, json.loads((Path(folder) / "metrics.json").read_text())


def test_the_same_images_evaluate_the_same_whatever_order_their_source_gives_the_classes(numbered):
    folder, own = metrics_of(numbered)
    assert own["top1"] >= 0.9
    reversed_classes = f"data.classes=[{','.join(reversed(TWELVE))}]"
    for settings in (["data.source=folder", f"data.path={numbered}/images"], [reversed_classes]):
        other, got = metrics_of(numbered, *settings)
        assert got["top1"] == own["top1"]
        assert got["top1_per_class"] == own["top1_per_class"]
        assert other != folder, "the run's own evaluation stays"
        assert got["data"]["source"] == ("folder" if "folder" in settings[0] else "csv")
    assert json.loads((Path(folder) / "metrics.json").read_text()) == own


def test_a_subset_of_the_classes_is_evaluated_under_its_names(numbered):
    _, own = metrics_of(numbered)
    _, got = metrics_of(numbered, "data.source=folder", f"data.path={numbered}/images", "data.classes=[10,2]")
    assert got["count"] == 4
    assert got["top1_per_class"] == {name: own["top1_per_class"][name] for name in ("2", "10")}


# As many as the checkpoint's: a network of the same shape, for classes of other names.
OTHERS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx"]


@pytest.mark.parametrize(("names", "unknown"), [(["ant", "1"], "does not know 1: ant"), (OTHERS, "does not know 12:")])
def test_names_that_the_checkpoint_does_not_know_are_refused(names, unknown, numbered, tmp_path):
    write_images(tmp_path, names, each=4)
    output = refusal("evaluate", f"from={numbered}/run", "data.source=folder", f"data.path={tmp_path}")
    assert unknown in output


@pytest.mark.parametrize(
    "setting", ["data.image_size=[64,64]", "model.num_layers=3", "data.channels=1"], ids=["size", "layers", "channels"]
)
def test_an_evaluation_as_another_network_is_refused(numbered, setting):
    more = ["data.mean=[0.5]", "data.std=[0.5]"] if "channels" in setting else []
    assert "is another network" in refusal("evaluate", f"from={numbered}/run", setting, *more)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run of three colours, stopped after 4 of 12 steps."""
    root = tmp_path_factory.mktemp("three")
    write_images(root / "images", ["apple", "lime", "sky"])
    train([f"data.path={root}/images", *UNBROKEN, "train.stop_at=4", f"run.dir={root}/run"])
    return root


UNBROKEN = [
    "data=folder",
    "data.val_fraction=0.25",
    *KEYS,
    "train.global_batch=6",
    "train.epochs=4",
    "metrics.log_every=1",
]


def resumed(root, *settings):
    return ["train", f"data.path={root}/images", *UNBROKEN, f"run.dir={root}/run", *settings]


def test_a_resume_refuses_classes_that_are_new_gone_or_moved(three):
    apple, zapple, extra = (three / "images" / name for name in ("apple", "zapple", "blue"))
    apple.rename(zapple)
    output = refusal(*resumed(three))
    zapple.rename(apple)
    assert "new: zapple; gone: apple; moved: lime (1 → 0), sky (2 → 1)" in output
    assert "init_from=" in output
    write_images(three / "images", ["blue"])
    output = refusal(*resumed(three))
    for file in extra.iterdir():
        file.unlink()
    extra.rmdir()
    assert "new: blue; moved: lime (1 → 2), sky (2 → 3)" in output


def test_a_resume_refuses_another_normalisation(three):
    assert "data.mean was [0.485, 0.456, 0.406] and is [0.9, 0.9, 0.9]" in refusal(
        *resumed(three, "data.mean=[0.9,0.9,0.9]")
    )


def test_a_run_in_epochs_goes_on_with_another_batch_until_its_images_are_consumed(three):
    # 18 training images, 4 epochs: 72 images, of which 4 steps of 6 took 24.
    code, said, err = run_command(*resumed(three, "train.global_batch=12", "data.crop_pct=0.9"))
    assert code == 0, err
    assert "changed since step 4: train.global_batch was 6 and is 12; data.crop_pct was 0.875 and is 0.9" in said
    assert "complete: step 8 of 8" in said
    assert "train.epochs=4 of 18 images = 72, of which 48 are left for steps of 12" in said
    rows = [json.loads(line) for line in (three / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("consumed_samples", 0) for row in rows) == 72


@pytest.mark.parametrize(("epochs", "images", "batch", "steps"), [(1.1, 50_000, 100, 550), (16.1, 1_000, 100, 161)])
def test_a_fraction_of_epochs_is_what_was_typed(epochs, images, batch, steps):
    config = ExperimentConfig()
    config.train.steps, config.train.epochs, config.train.global_batch = None, epochs, batch
    config.optim.warmup_steps = 0
    assert resolve_num_steps(config, images) == steps


def test_every_setting_says_whether_a_resume_may_change_it():
    assert RULES.keys() == run_types().keys()
