"""What the README and docs/ tell a user to type is typed here."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from megavit.data.sources.digits import Digits
from tests.trained import run_command

ROOT = Path(__file__).parent.parent


def blocks(document: str, heading: str, language: str) -> list[str]:
    """The code blocks of one section."""
    text = (ROOT / document).read_text()
    section = re.split(r"^## ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess:
    """One command line, in a folder, with megavit's console script on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PATH": path, "MEGAVIT_DEVICE": "cpu", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip


def draw(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((48, 40), 60).convert("RGB").point(lambda level: (level + value) % 256).save(path)


def commands(block: str) -> list[str]:
    """The commands of a block, each in one line and without its comment."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


# Sections whose commands the tests of this file and of tests/cluster/test_submit.py run.
RUN_BY_TESTS = [
    ("docs/quickstart.md", "Train, evaluate, predict"),
    ("docs/data.md", "Your images"),
    ("docs/pretraining.md", "From unlabelled images to a classifier"),
    ("docs/parallelism.md", "Layouts"),
    ("docs/clusters.md", "Submit a job"),
]


def test_every_command_of_the_readme_is_in_a_page_and_run_by_a_test():
    run = {
        line for page, heading in RUN_BY_TESTS for block in blocks(page, heading, "bash") for line in commands(block)
    }
    readme = (ROOT / "README.md").read_text()
    typed = [line for block in re.findall(r"^```bash\n(.*?)^```", readme, re.M | re.S) for line in commands(block)]
    assert len(typed) >= 12
    assert [line for line in typed if line not in run] == ["pip install ."]
    (code,) = blocks("README.md", "Use it from Python", "python")
    assert [code] == blocks("docs/data.md", "Use the model from Python", "python")


def test_the_readme_is_short_and_says_on_its_first_screen_that_nothing_has_run_on_a_gpu():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    assert "nothing has run on a GPU yet" in first
    assert "(docs/status.md)" in first
    for question in ("**Why megavit**", "Use [timm]", "pip install ."):
        assert question in first


def test_the_first_run_as_the_guide_says(tmp_path):
    draw(tmp_path / "PATH" / "a.jpg", 120)
    (block,) = blocks("docs/quickstart.md", "Train, evaluate, predict", "bash")
    names = []
    for line in commands(block):
        name, *arguments = shlex.split(line)[1:]
        names.append(name)
        if name == "train":
            more = "train.steps=2000" in arguments
            arguments = [text for text in arguments if text != "train.steps=2000"]
            arguments += [f"train.steps={30 if more else 20}", "run.ranks=1"]
        code, out, err = run_command(name, *arguments, folder=tmp_path)
        assert code == 0, f"{line}\n{err}"
    assert names == ["train", "evaluate", "predict", "train", "verify"]
    assert "step_00000030" in out


@pytest.mark.slow
def test_the_layouts_of_the_guide_train_on_cpu_processes(tmp_path):
    first, larger = blocks("docs/parallelism.md", "Layouts", "bash")
    own, torchrun = commands(first)
    (network,) = commands(larger)
    small = "train.global_batch=8 train.micro_batch=4 data.image_size=[32,32] model.num_layers=4 "
    small += "model.hidden_size=128 model.ffn_size=256 model.num_heads=4 train.steps=2"
    lines = [
        f"{own} run.ranks=4 train.steps=2 run.name=own",
        f"{torchrun.replace('--nproc-per-node 8', '--nproc-per-node 4')} train.steps=2 run.name=torchrun",
        f"{network} {small} run.ranks=4 run.name=network",
    ]
    for line in lines:
        done = shell(line.replace("train.steps=20 ", ""), tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_your_images_from_a_folder_to_predictions_as_the_page_says(tmp_path):
    for number in range(10):
        for name, value in (("bright", 120), ("dark", 0)):
            draw(tmp_path / "FOLDER" / name / f"{number}.jpg", value)
    for name in "ab":
        draw(tmp_path / "PATH" / f"{name}.jpg", 120)
        draw(tmp_path / f"{name}.jpg", 120)
    (block,) = blocks("docs/data.md", "Your images", "bash")
    lines = commands(block)
    assert [shlex.split(line)[:2][-1] for line in lines] == ["train", "evaluate", "predict", "inspect", "recipes"]
    for line in lines:
        # As many epochs and pixels as a test has time for; all else as it stands there.
        short = "train.epochs=2 train.global_batch=8 data.image_size=[64,64]"
        arguments = shlex.split(line.replace("train.epochs=10", short))[1:]
        code, _, err = run_command(*arguments, folder=tmp_path)
        assert code == 0, f"{line}\n{err}"
        assert "Traceback" not in err
    (look,) = blocks("docs/data.md", "Augmentation", "bash")
    code, output, err = run_command(*shlex.split(look, comments=True)[1:], folder=tmp_path)
    assert code == 0, err
    assert output.startswith("runs/digits/pictures/data.png: the first 8 of 1,437 training images")
    rows = list(csv.DictReader((tmp_path / "guesses.csv").open()))
    assert [Path(row["image"]).name for row in rows] == ["a.jpg", "b.jpg"]
    assert {rows[0]["class_1"], rows[0]["class_2"]} == {"bright", "dark"}
    (code,) = blocks("docs/data.md", "Use the model from Python", "python")
    checked = f"{code}\nassert scores.shape == (2, 2) and features.shape == (2, 192), (scores.shape, features.shape)"
    (tmp_path / "look.py").write_text(checked)
    done = shell("python look.py", tmp_path)
    assert done.returncode == 0, done.stderr


def test_unlabelled_images_become_a_classifier_as_the_page_says(tmp_path, figure):
    for split, folders in (("train", ["UNLABELLED", "LABELLED"]), ("val", ["LABELLED"])):
        source = Digits(split)
        for index in range(len(source)):
            name = source.classes[source.label(index)]
            places = [tmp_path / "UNLABELLED"] if "UNLABELLED" in folders else []
            # A labelled image for every three without.
            places += [tmp_path / "LABELLED" / name] if index % 3 == 0 else []
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(source.image(index)[0].numpy()).save(place / f"{split}{index}.png")
    (block,) = blocks("docs/pretraining.md", "From unlabelled images to a classifier", "bash")
    # Of the digits' size and as many steps as a test has time for; all else as it stands there.
    small = (
        "data.channels=1 data.mean=[0.305] data.std=[0.376] data.image_size=[8,8] data.crop_scale=null data.flip=false "
        "data.workers=0 model.patch_size=2 model.hidden_size=48 model.ffn_size=192 model.num_layers=2 "
        "train.global_batch=128"
    )
    decoder = (
        "task.decoder_hidden_size=32 task.decoder_ffn_size=64 task.decoder_num_heads=4 task.decoder_num_layers=1 "
        "task.norm_pix_loss=false"
    )
    said = {}
    for line in commands(block):
        name, *arguments = shlex.split(line)[1:]
        if name == "train":
            length = f"train.epochs=12 {decoder}" if "task=mae" in arguments else "train.epochs=10"
            short = [text for text in arguments if not text.startswith("train.epochs=")]
            arguments = [*short, *length.split(), *small.split()]
        code, out, err = run_command(name, *arguments, folder=tmp_path)
        assert code == 0, f"{line}\n{err}"
        said[line.rpartition("run.name=")[2] if name == "train" else name] = out
    assert list(said) == ["pre", "knn", "fewshot", "probe", "tuned", "evaluate", "convert", "features"]
    for run in ("probe", "tuned"):
        assert "starts from the weights of runs/pre/checkpoints/step_" in said[run]
    top1 = float(re.search(r"top1 (\d\.\d+)", said["evaluate"]).group(1))
    near = float(re.search(r"k=10  top1 (\d\.\d+)", said["knn"]).group(1))
    figure(f"digits as files, 2 layers, 12 epochs of MAE: kNN {near:.4f}, fine-tuned 10 epochs {top1:.4f}")
    # A guess is right one time in ten.
    assert near > 0.25
    assert top1 > 0.25
    assert {path.name for path in (tmp_path / "MODEL").iterdir()} >= {"config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "FEATURES").iterdir()} == {
        f"{split}.{form}" for split in ("train", "val") for form in ("safetensors", "txt")
    }


@pytest.mark.slow
def test_a_source_of_ones_own_as_the_guide_says(tmp_path):
    (code,) = blocks("docs/extending.md", "A source", "python")
    (tmp_path / "my_scans.py").write_text(code)
    (tmp_path / "SCANS").mkdir()
    for split, count in (("train", 16), ("val", 6)):
        images = [torch.randint(0, 256, (3, 20 + n, 30), dtype=torch.uint8) for n in range(count)]
        torch.save((images, [n % 2 for n in range(count)]), tmp_path / "SCANS" / f"{split}.pt")
    (command,) = blocks("docs/extending.md", "A source", "bash")
    short = command.replace("train.epochs=10", "train.epochs=1 train.global_batch=8 data.workers=1").strip()
    done = shell(short, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"data.source is my_scans:Scans, from {tmp_path}/my_scans.py" in done.stdout
    # Somebody else's checkpoint would run their code: it must be typed.
    refused = shell("megavit evaluate from=runs/scans", tmp_path)
    assert refused.returncode == 2
    assert "type data.source=my_scans:Scans too, if you trust it" in refused.stderr
    typed = shell("megavit evaluate from=runs/scans data.source=my_scans:Scans", tmp_path)
    assert typed.returncode == 0, typed.stderr


@pytest.mark.slow
def test_a_transform_and_a_task_of_ones_own_as_the_guide_says(tmp_path):
    # The digits are grey, and a jitter of colour leaves them so.
    command = "megavit train train.steps=3 optim.warmup_steps=1"
    parts = {"A transform": "data.transform=my_looks:jitter", "A task": "task.implementation=my_tasks:Weighed"}
    for heading, setting in parts.items():
        (code,) = blocks("docs/extending.md", heading, "python")
        (tmp_path / f"{setting.partition('=')[2].partition(':')[0]}.py").write_text(code)
        assert setting in blocks("docs/extending.md", heading, "bash")[0]
        command += f" {setting}"
    done = shell(command, tmp_path)
    assert done.returncode == 0, done.stderr
    for setting in parts.values():
        assert setting.replace("=", " is ") in done.stdout
