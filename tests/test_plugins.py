"""Parts of a user's own, by name: imported from where they may be, held to what they promise."""

import sys

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.plugins import check_name, import_plugin
from tests.distributed import run_ranks
from tests.reference import SMALL

MODULE = '''
import torch
from torchvision.transforms import v2

from megavit.task.classification import ClassificationTask


class Stripes:
    """Two classes of stripes, and noise upon them."""

    classes = ("down", "across")
    image_shape = None

    def __init__(self, config, split):
        self.split = split

    def __len__(self):
        return 64 if self.split == "train" else 16

    def label(self, index):
        return index % 2

    def image(self, index):
        image = torch.zeros(1, 8, 8, dtype=torch.uint8)
        image[:, ::2] = 200
        noise = torch.randint(0, 50, image.shape, generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return (image if index % 2 else image.mT) + noise


def negative(image):
    return 255 - image


def randomly(image):
    return image + torch.randint(0, 5, (), dtype=torch.uint8)


def broken(image):
    return image.float()


class Wide(ClassificationTask):
    """Also count the calls that its parent counts."""

    def metrics(self, totals):
        return {**super().metrics(totals), "seen": totals["count"]}


class NoSource:
    def __init__(self, config, split):
        pass


flipped = v2.RandomVerticalFlip(p=1.0)
number = 3
raise_at_import = "megavit" not in globals()
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A working folder with a module of one's own."""
    (tmp_path / "my_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    # Imported anew, from this test's folder.
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("my_parts", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_parts", "must be package.module:name"),
        ("my_parts:", "must be package.module:name"),
        ("my-parts:x", "must be package.module:name"),
        ("/etc/x:y", "must be package.module:name"),
        (".my_parts:Stripes", "must be package.module:name"),
        ("os:system", "os is in Python's standard library"),
        ("builtins:eval", "builtins is in Python's standard library"),
        ("subprocess:run", "subprocess is in Python's standard library"),
        ("no_such_thing:x", "no_such_thing is neither an installed package nor no_such_thing.py"),
    ],
)
def test_what_is_no_name_of_ones_own_part_is_refused_without_importing_it(name, message, mine):
    with pytest.raises(ConfigError, match=message):
        check_name(name, "data.source")
    assert "my_parts" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_parts:Stripe", r"my_parts\.py has no Stripe"),
        ("my_parts.deeper:x", "there is no module my_parts.deeper"),
    ],
)
def test_what_is_not_there_is_named(name, message, mine):
    with pytest.raises(ConfigError, match=message):
        import_plugin(name, "data.source")


def test_installed_packages_are_found():
    import torchvision.transforms.v2

    assert import_plugin("torchvision.transforms.v2:GaussianNoise", "x") is torchvision.transforms.v2.GaussianNoise


def train_there(folder: str, overrides: list[str]) -> dict:
    import os
    import sys
    from pathlib import Path

    from megavit.config.compose import compose
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    before, path = os.getcwd(), list(sys.path)
    sys.modules.pop("my_parts", None)
    os.chdir(folder)
    try:
        config = compose(overrides)
        validate(config, world_size_from_environment())
        trainer = Trainer(config)
        batch = next(trainer.train_loader.train_batches(0, num_steps=1, global_batch=16))
        trainer.run()
    finally:
        os.chdir(before)
        sys.path[:] = path
    return {
        "validation": trainer.last_validation,
        "images": batch.images_BCYX,
        "keys": batch.keys,
        "log": (Path(config.run.dir) / "train.log").read_text(),
    }


OWN = [*SMALL, "data.source=my_parts:Stripes", "data.mean=[0.4]", "data.std=[0.4]", "train.steps=12", "optim.lr=3e-3"]


def test_a_source_a_transform_and_a_task_of_ones_own_train(mine):
    task = "task.implementation=my_parts:Wide"
    keys = [*OWN, "data.transform=my_parts:negative", task, f"run.dir={mine / 'run'}"]
    plain, own = (
        run_ranks(train_there, 1, str(mine), overrides)[0] for overrides in ([*OWN, f"run.dir={mine / 'plain'}"], keys)
    )
    assert torch.equal(own["images"], 255 - plain["images"])
    assert own["validation"]["seen"] == 16
    assert plain["validation"]["top1"] == 1
    for name in (
        "data.source is my_parts:Stripes, from ",
        "data.transform is my_parts:negative",
        "my_parts:Wide, from ",
    ):
        assert name in own["log"]
    assert f"{mine}/my_parts.py" in own["log"]


def test_a_transforms_draws_are_functions_of_the_sample_and_torchvisions_objects_serve(mine):
    config = compose([*OWN, "data.transform=my_parts:randomly"]).data
    from megavit.data.sampler import SampleKey
    from megavit.data.transforms.image import ImageTransform

    def see(name: str, keys: list[SampleKey]) -> list[torch.Tensor]:
        from dataclasses import replace

        view = ImageTransform(replace(config, transform=name), augment=True)
        return view([torch.arange(64, dtype=torch.uint8).view(1, 8, 8)] * len(keys), keys, seed=0)

    keys = [SampleKey(index, 0) for index in range(8)]
    first = see("my_parts:randomly", keys)
    assert all(torch.equal(a, b) for a, b in zip(first, see("my_parts:randomly", keys[::-1])[::-1], strict=True))
    assert len({int(image[0, 0, 0]) for image in first}) > 1
    assert torch.equal(see("my_parts:flipped", keys)[0][0, 0], torch.arange(56, 64, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"my_parts:broken returned torch.float32 \[1, 8, 8\] for an image"):
        see("my_parts:broken", keys)
    with pytest.raises(ConfigError, match="my_parts:number is a int; a function is needed"):
        see("my_parts:number", keys)


def test_a_source_that_lacks_something_is_refused(mine):
    from megavit.data.sources.open import open_source

    with pytest.raises(ConfigError, match="my_parts:NoSource lacks classes, image_shape, __len__, image, label"):
        open_source(compose([*OWN, "data.source=my_parts:NoSource"]).data, "train")


def test_a_class_that_declares_what_it_reads_is_checked_against_the_settings(mine):
    from megavit.data.sources.open import open_source

    def refusal(declared: str, *settings: str) -> str:
        (mine / "my_parts.py").write_text(f"{MODULE}\n\nclass Declared(Stripes):\n    {declared}\n")
        sys.modules.pop("my_parts", None)
        with pytest.raises(ConfigError) as error:
            open_source(compose([*OWN, "data.source=my_parts:Declared", *settings]).data, "train")
        return str(error.value)

    assert "needs data.path" in refusal("takes_path = True")
    assert "ignores data.path=here; set it to null" in refusal("takes_path = False", "data.path=here")
    assert "data.path=s3://here is a URL" in refusal("reads_urls = False", "data.path=s3://here")
    assert "set data.multi_label=false" in refusal("multi_label = False", "data.multi_label=true", "task.loss=bce")


def test_a_source_is_added_by_a_file_and_a_row(mine, monkeypatch):
    from megavit.data.sources import registry
    from megavit.data.sources.open import open_source

    monkeypatch.syspath_prepend(str(mine))
    monkeypatch.setitem(registry.SOURCES, "stripes", registry.SourceSpec("my_parts:Stripes"))
    monkeypatch.setitem(registry.SOURCES, "scans", registry.SourceSpec("my_parts:Stripes", takes_path=True))
    config = compose([*OWN, "data.source=stripes"])
    config.data.check()
    source = open_source(config.data, "train")
    assert (type(source).__name__, len(source)) == ("Stripes", 64)
    with pytest.raises(ConfigError, match=r"did you mean stripes\?"):
        compose([*OWN, "data.source=stripe"]).data.check()
    with pytest.raises(ConfigError, match=r"data\.path=here would be ignored by data\.source=stripes"):
        compose([*OWN, "data.source=stripes", "data.path=here"]).data.check()
    with pytest.raises(ConfigError, match=r"data\.source=scans needs data\.path"):
        compose([*OWN, "data.source=scans"]).data.check()
    with pytest.raises(
        ConfigError, match=r"data\.path=s3://here is a URL, and data\.source=scans reads this machine's"
    ):
        compose([*OWN, "data.source=scans", "data.path=s3://here"]).data.check()
    with pytest.raises(ConfigError, match=r"data\.source of csv, parquet, arrow, hub, or your own; stripes has"):
        compose([*OWN, "data.source=stripes", "data.multi_label=true", "task.loss=bce"]).data.check()
