"""Mistakes that users make: one message that names them, code 2, no traceback, no hang."""

import contextlib
import fcntl
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavit.checkpoint.manifest import FILE, describe, write_manifest
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.runtime.test_launch import exit_record

MODEL = [*SMALL, "train.steps=3", "optim.warmup_steps=1"]
# The smallest of these data sets has two images to train on.
BATCH = ["train.global_batch=2", "train.micro_batch=2"]
OWN = ["recipe=null", "data=folder", "model.patch_size=8", "data.image_size=[16,16]", "data.workers=0", *MODEL, *BATCH]


def main_here(arguments: list[str]) -> tuple[int, str]:
    """The command line, in a process of the pool: its code, and what it printed to stderr."""
    from megavit.cli.main import main

    sys.argv = ["megavit", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as output:
        code = main()
    return code, output.getvalue()


def draw(path: Path, size: tuple[int, int] = (20, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).convert("RGB").save(path)
    return path


def folder(root: Path) -> Path:
    """Two classes with eight images each."""
    for number in range(16):
        draw(root / "images" / ("ant" if number % 2 else "bee") / f"{number}.png")
    return root / "images"


def train(root: Path, *settings: str) -> list[str]:
    return ["train", *MODEL, f"run.dir={root / 'run'}", *settings]


def train_own(root: Path, path: Path, *settings: str) -> list[str]:
    return ["train", *OWN, f"data.path={path}", "data.val_fraction=0.25", f"run.dir={root / 'run'}", *settings]


def with_empty_class(root: Path) -> list[str]:
    (folder(root) / "cat").mkdir()
    return train_own(root, root / "images")


def with_corrupt_image(root: Path) -> list[str]:
    image = folder(root) / "ant" / "1.png"
    for path in image.parent.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    return train_own(root, root / "images")


def with_text_named_image(root: Path) -> list[str]:
    for path in (folder(root) / "bee").iterdir():
        path.write_text("no picture")
    return train_own(root, root / "images", "data.workers=1")


def with_wrong_channels(root: Path) -> list[str]:
    for name in ("a/0", "a/1", "b/2", "b/3"):
        (root / "arrays" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / "arrays" / f"{name}.npy", np.zeros((16, 16, 5), dtype=np.uint8))
    return train_own(root, root / "arrays")


def with_labels_out_of_range(root: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": draw(root / "x.png").read_bytes(), "path": None}] * 4
    for split, labels in (("train", [0, 1, 0, 1]), ("val", [0, 1, 2, 7])):
        pq.write_table(pa.table({"image": cells, "label": labels}), root / f"{split}.parquet")
    return [*train_own(root, root, "data.source=parquet"), "data.val_fraction=null"]


def with_broken_parquet(root: Path) -> list[str]:
    (root / "all.parquet").write_bytes(b"PAR1 and then nothing")
    return train_own(root, root / "all.parquet", "data.source=parquet")


def with_listed_image_gone(root: Path) -> list[str]:
    names = [draw(root / f"{number}.png").name for number in range(8)]
    (root / "all.csv").write_text("\n".join(["path,label", *(f"{name},{int(name[0]) % 2}" for name in names)]))
    for name in names[1:]:
        (root / name).unlink()
    return train_own(root, root / "all.csv", "data.source=csv")


def with_other_columns(root: Path) -> list[str]:
    (root / "all.csv").write_text("image,class\n0.png,a\n")
    return train_own(root, root / "all.csv", "data.source=csv")


def without_labels(root: Path) -> list[str]:
    return train_own(root, folder(root), "data.source=images")


def with_a_module_that_is_not_there(root: Path) -> list[str]:
    return train_own(root, folder(root), "data.source=my_scans:Scans")


def saved(root: Path) -> Path:
    """The folder of a run with a checkpoint, of the module's fixture."""
    return Path(shutil.copytree(root.parent / "saved", root / "run"))


def of_another_model(root: Path) -> list[str]:
    saved(root)
    return train(root, "model.num_layers=2")


def never_again(root: Path) -> list[str]:
    saved(root)
    return train(root, "checkpoint.resume=never")


def stop_in_the_past(root: Path) -> list[str]:
    saved(root)
    return train(root, "train.steps=9", "train.stop_at=2")


def with_nothing_valid(root: Path) -> list[str]:
    (saved(root) / "checkpoints" / "step_00000003" / "common.pt").write_bytes(b"")
    return train(root, "train.steps=9")


def tampered(root: Path, old: str, new: str) -> Path:
    """A run whose configuration was changed by somebody who put the manifest in order."""
    run_dir = saved(root)
    checkpoint = run_dir / "checkpoints" / "step_00000003"
    text = (checkpoint / "run.yaml").read_text()
    assert old in text
    (checkpoint / "run.yaml").write_text(text.replace(old, new))
    write_manifest(checkpoint, describe(checkpoint, [p.name for p in checkpoint.iterdir() if p.name != FILE]))
    return run_dir


def with_a_torn_configuration(root: Path) -> list[str]:
    return ["predict", f"from={tampered(root, 'run:', 'run: [')}", f"images={draw(root / 'x.png')}"]


def with_a_tampered_configuration(root: Path) -> list[str]:
    return ["evaluate", f"from={tampered(root, 'name: digits', 'name: ${oc.env:HOME}')}"]


def with_a_strangers_code(root: Path) -> list[str]:
    return ["evaluate", f"from={tampered(root, 'source: digits', 'source: strange_code:Source')}"]


def predicting(path: Callable[[Path], str]) -> Callable[[Path], list[str]]:
    return lambda root: ["predict", f"from={saved(root)}", f"images={path(root)}"]


def no_picture(root: Path) -> str:
    (root / "x.jpg").write_text("no picture")
    return str(root / "x.jpg")


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "absent path": (lambda root: train_own(root, root / "nowhere"), "nowhere is not a folder"),
    "no path": (lambda root: ["train", *OWN, f"run.dir={root / 'run'}"], "data.source=folder needs data.path"),
    "no class folders": (lambda root: train_own(root, draw(root / "x" / "1.png").parent), "has no class folders"),
    "empty class": (with_empty_class, "cat holds no image"),
    "one image per class": (
        lambda root: train_own(root, draw(root / "x" / "ant" / "1.png").parent.parent),
        "one image per class",
    ),
    "no share to validate on": (
        lambda root: train_own(root, folder(root), "data.val_fraction=null"),
        "set the fraction of each class for validation, data.val_fraction=0.1",
    ),
    "corrupt image": (with_corrupt_image, ".png cannot be read as an image: "),
    "text named .png, in a worker": (with_text_named_image, ".png cannot be read as an image: Pillow does not know"),
    "wrong channels": (with_wrong_channels, ".npy has 5 channels, and data.channels=3"),
    "labels out of range": (with_labels_out_of_range, "labels go from 0 to 7, and there are 2 classes"),
    "broken parquet": (with_broken_parquet, "all.parquet cannot be read as parquet"),
    "a listed image is gone": (with_listed_image_gone, ".png cannot be read as an image: [Errno 2]"),
    "a list of other columns": (with_other_columns, "must name the columns path and label"),
    "a classifier without labels": (without_labels, "task.name=classify needs labels"),
    "a module that is not there": (with_a_module_that_is_not_there, "my_scans is neither an installed package nor"),
    "Python's own module": (lambda root: train(root, "data.source=os:system"), "os is in Python's standard library"),
    "unknown source": (lambda root: train(root, "data.source=foldre"), "did you mean folder?"),
    "unknown class": (
        lambda root: train_own(root, folder(root), "data.classes=[ants]"),
        "data.classes: ants is no class of data.source=folder; did you mean ant?",
    ),
    "more samples than there are": (
        lambda root: train_own(root, folder(root), "data.samples_per_class=7"),
        "data.samples_per_class=7 is more than the 6 training images of class ant",
    ),
    "misspelt setting": (lambda root: train(root, "optim.learning_rate=1"), "the setting optim.learning_rate does not"),
    "unknown recipe": (lambda root: ["train", "recipe=digit"], "did you mean recipe=digits"),
    "a word for a number": (lambda root: train(root, "train.global_batch=many"), "train.global_batch: Value 'many'"),
    "several values": (lambda root: train(root, "optim.lr=1e-3,1e-4"), "gives several values, and a run takes one"),
    "no setting at all": (lambda root: train(root, "faster"), "'faster' is no setting: write key=value"),
    "neither steps nor epochs": (lambda root: train(root, "train.steps=null"), "say how long to train"),
    "warm-up longer than the run": (
        lambda root: train(root, "optim.warmup_steps=50"),
        "must be below the run's 3 steps",
    ),
    "image no multiple of the patch": (
        lambda root: train(root, "data.image_size=[9,9]"),
        "data.image_size=[9, 9] is not divisible by model.patch_size=2",
    ),
    "one mean for three channels": (
        lambda root: train_own(root, folder(root), "data.mean=[0.5]"),
        "data.mean=[0.5] has 1 values and data.channels=3",
    ),
    "a world that does not divide": (
        lambda root: train(root, "run.ranks=3", "parallel.tp=2"),
        "world size 3 is not a multiple of parallel.tp=2",
    ),
    "a batch that does not divide": (
        lambda root: train(root, "train.global_batch=10", "train.micro_batch=4"),
        "train.global_batch=10 is not a multiple of",
    ),
    "heads that tensor parallelism cannot share": (
        lambda root: train(root, "run.ranks=3", "parallel.tp=3"),
        "model.num_heads=4 is not divided by parallel.tp=3",
    ),
    "tokens that sequence parallelism cannot share": (
        lambda root: train(root, "run.ranks=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
        "16 patches + 1 class tokens = 17 tokens over parallel.tp=2 ranks",
    ),
    "a kernel that is not installed": (
        lambda root: train(root, "model.attention_backend=flash_attn", "train.precision=bf16_o2"),
        "model.attention_backend=flash_attn",
    ),
    "an optimizer that is not installed": (
        lambda root: train(root, "optim.implementation=apex"),
        "optim.implementation=apex is not installed",
    ),
    "a folder that cannot be written": (
        lambda root: [*train(root), "run.dir=/dev/null/run"],
        "run.dir=/dev/null/run cannot be written: Not a directory",
    ),
    "a disk too small for the checkpoints": (
        lambda root: train(root, "run.preflight=true", "train.steps=1000000000", "checkpoint.save_every=1"),
        "has no room for 1000000000 checkpoints",
    ),
    "a checkpoint of another model": (of_another_model, "is of another model or run: model.num_layers was 4 and is 2"),
    "a checkpoint in the way": (never_again, "already holds checkpoints up to step_00000003"),
    "nothing to resume from": (
        lambda root: train(root, f"checkpoint.resume={root}"),
        "is not a checkpoint: give a run folder",
    ),
    "a stop in the past": (stop_in_the_past, "train.stop_at=2 is not after step 3"),
    "nothing valid to resume from": (with_nothing_valid, "is valid: "),
    "nothing to predict from": (lambda root: ["predict", f"from={root}", "images=."], "holds no checkpoint"),
    "images that are not there": (
        predicting(lambda root: "nowhere"),
        "images=nowhere is neither an image nor a folder",
    ),
    "no picture to predict": (predicting(no_picture), "x.jpg cannot be read as an image"),
    "a torn configuration": (with_a_torn_configuration, "a run's configuration cannot be read"),
    "a tampered configuration": (with_a_tampered_configuration, "holds ${…}, which is resolved before it is written"),
    "a stranger's code": (with_a_strangers_code, "data.source=strange_code:Source, code from outside megavit; type"),
    "an unknown command": (lambda root: ["trian"], "the command trian does not exist; did you mean train?"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder that holds a run of three steps."""
    folder = tmp_path_factory.mktemp("mistakes")
    code, output = run_ranks(main_here, 1, ["train", *MODEL, f"run.dir={folder / 'saved'}"])[0]
    assert code == 0, output
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_and_code_2(mistake, root, tmp_path_factory):
    make, message = MISTAKES[mistake]
    place = root / re.sub(r"\W", "_", mistake)
    place.mkdir()
    code, output = run_ranks(main_here, 1, make(place), timeout_s=60)[0]
    assert message in output
    assert "Traceback" not in output
    assert output.count("megavit: ") == 1
    assert code == 2
    shutil.rmtree(place)


def test_thirty_mistakes_are_listed():
    assert len(MISTAKES) >= 30


def test_two_runs_in_one_folder_at_once_the_second_is_refused_and_the_first_goes_on(tmp_path):
    command = [*MODEL, "train.steps=1000000", f"run.dir={tmp_path}", "run.ranks=1"]
    first = subprocess.Popen(
        [sys.executable, "-m", "megavit", "train", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "MEGAVIT_DEVICE": "cpu"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    code, output = run_ranks(main_here, 1, ["train", *command])[0]
    assert code == 2
    assert output.count("megavit: ") == 1
    assert f"run.dir={tmp_path} is in use by process " in output
    # The first run's record is its own, and it has noticed nothing.
    assert exit_record(tmp_path) == {"code": None, "error": None}
    first.terminate()
    _, output = first.communicate(timeout=60)
    assert first.returncode == 75, output
    assert exit_record(tmp_path)["code"] == 75


def test_a_claim_ends_with_its_process(tmp_path):
    from megavit.runtime.run_dir import claim_folder

    claim_folder(tmp_path).close()
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
