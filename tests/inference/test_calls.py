"""`megavit.evaluate` and `megavit.predict` give what the commands write."""

import csv
import json
import subprocess
import sys

import pytest
import torch.distributed as dist
from PIL import Image

import megavit
from megavit.data.sources.digits import Digits
from tests.trained import run_command, train_small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return megavit.Run(train_small(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        Image.fromarray(Digits("val").image(index)[0].numpy()).save(folder / f"{index}.png")
    return folder


def test_evaluate_returns_what_the_command_writes_and_leaves_no_world(run):
    # A command that another test called in this process may have left its world.
    before = dist.is_initialized()
    found = megavit.evaluate(run)
    assert dist.is_initialized() == before
    assert run_command("evaluate", f"from={run.dir}")[0] == 0
    file = next((run.dir / "evaluation").glob("*/metrics.json"))
    assert found == json.loads(file.read_text())
    assert found["count"] == 360
    assert megavit.evaluate(run, micro_batch=7)["top1"] == found["top1"]
    assert 0 < megavit.evaluate(run, classes=["0", "7"])["count"] < 120
    with pytest.raises(megavit.ConfigError, match=r"is another network: model.num_layers"):
        megavit.evaluate(run, num_layers=3)
    with pytest.raises(megavit.ConfigError, match="elsewhere"):
        megavit.evaluate(run.dir / "elsewhere")


def test_predict_returns_what_the_command_writes(run, images, tmp_path):
    found = megavit.predict(run, images, top=2)
    code, _, error = run_command(
        "predict", f"from={run.dir}", f"images={images}", "top=2", f"out={tmp_path / 'out.csv'}"
    )
    assert code == 0, error
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    expected = [
        [
            p.path,
            *(cell for name, share in zip(p.classes, p.probabilities, strict=True) for cell in (name, f"{share:.6f}")),
        ]
        for p in found
    ]
    assert rows == expected
    assert megavit.predict(run, [images / "1.png"], top=2) == found[1:2]
    logits = megavit.load(run)(megavit.load(run).read(images / "0.png"))
    assert found[0].probabilities[0] == pytest.approx(float(logits.softmax(dim=1).max()), abs=1e-6)


def test_an_unreadable_image_is_refused_or_left_out_with_a_warning(run, images, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(megavit.ConfigError, match=r"bad\.png"):
        megavit.predict(run, [images, tmp_path])
    with pytest.warns(UserWarning, match=r"bad\.png"):
        assert len(megavit.predict(run, [images, tmp_path], skip_unreadable=True)) == 3


def test_a_network_is_not_opened_while_a_run_is_under_way(tmp_path, run):
    refused = []

    def evaluate(report) -> None:
        for call in (megavit.evaluate, megavit.load):
            with pytest.raises(megavit.ConfigError, match="is under way in this process") as error:
                call(run)
            refused.append(error.value)

    trained = megavit.train("digits", steps=1, callbacks=[evaluate], **{"run.dir": tmp_path})
    assert trained.finished
    assert len(refused) == 2


def test_convert_writes_what_the_command_writes_and_reads_it_back(run, images, tmp_path):
    there = megavit.convert(run, f"timm:{tmp_path / 'a' / 'vit.safetensors'}")
    assert run_command("convert", f"from={run.dir}", f"to=timm:{tmp_path / 'b' / 'vit.safetensors'}")[0] == 0
    assert there.path.read_bytes() == (tmp_path / "b" / "vit.safetensors").read_bytes()
    back = megavit.convert(f"timm:{there.path}", tmp_path / "back", num_heads=4)
    assert "weights of timm:" in back.notes[0]
    assert megavit.predict(back, images) == megavit.predict(run, images)
    with pytest.raises(megavit.ConfigError, match="takes one run and one of"):
        megavit.convert(run, tmp_path / "other")
    with pytest.raises(megavit.ConfigError, match="push=a must be ORG/NAME"):
        megavit.convert(run, f"hf:{tmp_path / 'hf'}", push="a")


@pytest.mark.slow
def test_evaluate_on_two_ranks_gives_the_metrics_of_one(run):
    one, two = megavit.evaluate(run), megavit.evaluate(run, "run.ranks=2", "parallel.tp=2")
    assert two["top1"] == one["top1"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_importing_megavit_imports_no_torch_and_lists_its_functions():
    script = "import sys, megavit; print('torch' in sys.modules, 'hydra' in sys.modules, sorted(dir(megavit))[:3])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("False False ['ConfigError', 'Run', 'RunError']"), out
