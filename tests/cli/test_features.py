"""`megavit features`: what `megavit.load` says of every image, once and in order, in files that nothing overwrites."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from megavit.config.compose import compose
from megavit.data.sources.digits import Digits
from megavit.data.sources.open import open_source
from megavit.model.config import Pool
from megavit.model.torch_vit import TorchViT
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.test_mae_parity import MAE
from tests.trained import refusal, run_command, train_small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("classifier") / "run")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("autoencoder") / "run", *MAE)


def extract(run, out, *arguments: str) -> dict[str, dict[str, torch.Tensor]]:
    code, _, err = run_command("features", f"from={run}", f"out={out}", *arguments)
    assert code == 0, err
    return {path.stem: load_file(path) for path in sorted(out.glob("*.safetensors"))}


def look(run_dir: str, pool: str | None) -> list[torch.Tensor]:
    """The validation digits, one after the other."""
    import megavit

    model = megavit.load(run_dir)
    with torch.no_grad():
        return [
            model.features(Digits("val").image(index)[None], pool=None if pool is None else Pool[pool])
            for index in range(360)
        ]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_what_the_loaded_model_says_of_each_image_in_order(workers, trained, tmp_path, figure):
    # 50 images at a time leave 37 training and 10 validation images for the last.
    found = extract(trained, tmp_path, f"data.workers={workers}", "train.micro_batch=50")
    expected = torch.cat(run_ranks(look, 1, str(trained), None)[0])
    for split, count in (("train", 1437), ("val", 360)):
        assert found[split]["features"].shape == (count, 32)
        assert found[split]["features"].dtype == torch.float32
        assert found[split]["labels"].tolist() == [Digits(split).label(index) for index in range(count)]
        assert found[split]["labels"].dtype == torch.int64
    difference = float((found["val"]["features"] - expected).abs().max())
    figure(f"megavit features against one image at a time: largest difference {difference:.1e}")
    # Measured: 0, of values up to 2.5; on another machine's kernels a batch may order sums otherwise.
    assert difference <= 1e-5
    # Else any order would do.
    assert torch.cdist(expected, expected).fill_diagonal_(1).min() > 1e-4


def images_of_classes(folder, sizes=((20, 16), (9, 30))) -> list:
    """Images of two classes, of other sizes than the run's; those to validate on in the order of their listing."""
    paths = []
    for number in range(8):
        for split, name in ((split, name) for split in ("train", "val") for name in ("ant", "bee")):
            path = folder / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = torch.rand(sizes[number % 2], generator=torch.Generator().manual_seed(len(paths)))
            Image.fromarray((noise * 255).byte().numpy()).save(path)
            paths.append(path)
    source = open_source(replace(compose(["data=folder"]).data, path=str(folder)), "val")
    return [Path(source.name(index)) for index in range(len(source))]


def is_bee(paths: list) -> list[int]:
    return [int(path.parent.name == "bee") for path in paths]


def read_and_look(run_dir: str, paths: list[str]) -> torch.Tensor:
    import megavit

    model = megavit.load(run_dir)
    with torch.no_grad():
        return model.features(model.read(*paths))


def test_images_of_another_dataset_are_seen_as_the_run_evaluates(trained, tmp_path):
    paths = images_of_classes(tmp_path / "data")
    other = ["data.source=folder", f"data.path={tmp_path / 'data'}"]
    found = extract(trained, tmp_path / "out", *other, "splits=val")
    assert list(found) == ["val"]
    expected = run_ranks(read_and_look, 1, str(trained), [str(path) for path in paths])[0]
    # Measured: 0.
    assert (found["val"]["features"] - expected).abs().max() <= 1e-5
    assert found["val"]["labels"].tolist() == is_bee(paths)
    assert (tmp_path / "out" / "val.txt").read_text().splitlines() == [str(path) for path in paths]


def test_a_file_says_what_its_features_are_of(trained, tmp_path):
    extract(trained, tmp_path / "out", "pool=mean", "splits=val")
    with safe_open(tmp_path / "out" / "val.safetensors", "pt") as file:
        about = file.metadata()
    assert about == {
        "checkpoint": str(trained / "checkpoints" / "step_00000020"),
        "classes": json.dumps(list("0123456789")),
        "data.source": "digits",
        "data.path": "null",
        "pool": "mean",
        "split": "val",
    }


def test_images_without_labels_and_with_several(trained, tmp_path):
    images_of_classes(tmp_path / "data")
    bare = extract(trained, tmp_path / "bare", "data.source=images", f"data.path={tmp_path / 'data'}")
    assert bare["val"].keys() == {"features"}
    lines = [f"ant/{number}.png,{'ant|bee' if number % 2 else ''}" for number in range(8)]
    for split in ("train", "val"):
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["path,label", *(f"{split}/{at}" for at in lines)]))
    several = ["data.source=csv", f"data.path={tmp_path / 'data'}", "data.multi_label=true", "task.loss=bce"]
    labels = extract(trained, tmp_path / "several", *several)["val"]["labels"]
    assert labels.dtype == torch.bool
    assert labels.tolist() == [[number % 2 == 1] * 2 for number in range(8)]


def test_a_bad_image_stops_or_is_named_as_in_an_evaluation(trained, tmp_path):
    paths = images_of_classes(tmp_path / "data")
    paths[3].write_bytes(b"no image")
    other = ["splits=val", "data.source=folder", f"data.path={tmp_path / 'data'}"]
    assert str(paths[3]) in refusal("features", f"from={trained}", f"out={tmp_path / 'stops'}", *other)
    assert not list((tmp_path / "stops").iterdir())
    skips = ["data.on_bad_sample=skip", "data.max_bad_fraction=1", f"out={tmp_path / 'skips'}"]
    code, output, err = run_command("features", f"from={trained}", *other, *skips)
    assert code == 0, err
    assert f"val: {paths[3]}" in output
    assert "takes its place" in output
    found = load_file(tmp_path / "skips" / "val.safetensors")
    assert found["labels"].tolist() == is_bee(paths)
    (twin,) = [row for row in range(16) if row != 3 and torch.equal(found["features"][row], found["features"][3])]
    assert paths[twin].parent == paths[3].parent


def look_at_tokens(run_dir: str) -> tuple[torch.Tensor, torch.Tensor]:
    import megavit

    model = megavit.load(run_dir)
    images = torch.stack([Digits("val").image(index) for index in range(360)])
    with torch.no_grad():
        return model.features(images), model.tokens(images)


def test_of_an_autoencoder_the_class_token_is_taken_or_the_patches_mean(autoencoder, tmp_path):
    features, tokens = run_ranks(look_at_tokens, 1, str(autoencoder))[0]
    for pool, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(dim=1))):
        found = extract(autoencoder, tmp_path / pool, f"pool={pool}", "splits=val")["val"]
        # Measured: 0, of values up to 2.5.
        assert (found["features"] - expected).abs().max() <= 1e-5
        assert found["labels"].tolist() == [Digits("val").label(index) for index in range(360)]
    assert torch.equal(features, tokens[:, 0])
    assert (tokens[:, 0] - tokens[:, 1:].mean(dim=1)).abs().max() > 0.1


@pytest.mark.parametrize("own", list(Pool))
def test_either_pool_is_normed_as_the_model_norms(own):
    config = compose([*SMALL, "model.class_tokens=2", f"model.pool={own.value}"])
    torch.manual_seed(0)
    model = TorchViT(config.model, image_size=[8, 8], channels=1, num_classes=10)
    norm = model.norm if own is Pool.cls else model.fc_norm
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        images = torch.randn(5, 1, 8, 8)
        seen = []
        model.blocks[-1].register_forward_hook(lambda module, args, tokens: seen.append(tokens))
        by_default, first, mean = model.features(images), *(model.features(images, pool=pool) for pool in Pool)
        patches = seen[0][:, 2:]
        # The norm of each token, or of the mean of them.
        expected = norm(patches).mean(dim=1) if own is Pool.cls else norm(patches.mean(dim=1))
        # Measured: 0.
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(first, norm(seen[0][:, 0]), rtol=0, atol=1e-6)
    assert torch.equal(by_default, first if own is Pool.cls else mean)
    assert (first - mean).abs().max() > 0.1


def test_wrong_input_leaves_with_2_and_a_way_out(trained, tmp_path):
    (tmp_path / "file").write_text("")
    held = tmp_path / "held"
    held.mkdir()
    (held / "val.safetensors").write_text("kept")
    for arguments, message in (
        ([], "megavit features needs out=FOLDER"),
        (["out=x", "splits=test"], "splits=test: there is no split 'test'; give train, val or train,val"),
        (["out=x", "pool=max"], "pool=max must be one of cls, mean"),
        (["out=x", "pol=cls"], "megavit features knows no pol=; did you mean pool=?"),
        (["out=x", "out=y"], "out=y: megavit features takes out= once, with a value"),
        ([f"out={tmp_path / 'file'}"], f"{tmp_path / 'file'} is a file; give a folder"),
        ([f"out={held}"], f"{held / 'val.safetensors'} exists already and is not overwritten; give another out="),
        (["out=x", "parallel.tp=2"], "parallel.tp=2: megavit features runs in one process"),
        (["out=x", "data.wokers=2"], "did you mean data.workers"),
        (["out=x", "data.source=my_data:Mine"], "data.source=my_data:Mine"),
    ):
        assert message in refusal("features", f"from={trained}", *arguments), arguments
    assert (held / "val.safetensors").read_text() == "kept"
    assert [path.name for path in held.iterdir()] == ["val.safetensors"]
    assert "megavit features needs from=RUN" in refusal("features", "out=x")


def test_a_class_token_is_not_made_up(tmp_path):
    run = train_small(tmp_path / "run", "model.class_tokens=0", "model.pool=mean", "train.steps=3")
    message = refusal("features", f"from={run}", f"out={tmp_path / 'out'}", "pool=cls")
    assert "pool=cls needs a class token, and the model has model.class_tokens=0; choose pool=mean" in message
    assert not (tmp_path / "out").exists()
