"""Dense targets: cropped, flipped and shifted as their images, on every rank that reads them."""

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from megavit.data.config import DataConfig, OnBadSample
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources.digits import Digits
from megavit.data.sources.relabel import Relabelled
from megavit.data.sources.subset import choose
from megavit.errors import ConfigError

SIZE = 16
CONFIG = DataConfig(
    source="ramps",
    channels=1,
    image_size=[SIZE, SIZE],
    mean=[0.5],
    std=[0.5],
    workers=0,
    on_bad_sample=OnBadSample.stop,
)
AUGMENTED = [
    {},
    {"flip": True},
    {"crop_scale": [0.3, 1.0]},
    {"crop_scale": [0.3, 1.0], "flip": True, "random_shift": 2},
    {"crop_pct": 0.75},
]


class Ramps:
    """Images that grow brighter to the right or downwards, of several sizes; the target is the brightness."""

    classes = ("across", "down")
    image_shape = None
    dense_targets = MappingProxyType({"brightness": torch.uint8})

    def __len__(self):
        return 24

    def label(self, index):
        return index % 2

    def dense_target(self, index, name):
        rows, columns = 40 + index, 64 - index
        ramp = (
            torch.linspace(20, 220, columns).expand(rows, -1) if index % 2 else torch.linspace(20, 220, rows)[:, None]
        )
        return ramp.expand(rows, columns).to(torch.uint8)

    def image(self, index):
        return self.dense_target(index, "brightness").unsqueeze(0)


def read(source, config, *, images=True, train=True):
    layout = SimpleNamespace(tp_rank=0, tp=1, dp=1, dp_rank=0, pp=1, vpp=1, device=torch.device("cpu"))
    fields = RequiredFields(images=images, targets=("labels", "brightness"))
    loader = Loader(source, config, layout=layout, fields=fields, micro_batch=24, seed=3, train=train)
    batches = loader.train_batches(0, num_steps=1, global_batch=24) if train else loader.evaluation_batches()
    return next(iter(batches))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", AUGMENTED)
def test_a_target_is_cropped_flipped_and_shifted_as_its_image(change, train, figure):
    batch = read(Ramps(), replace(CONFIG, **change), train=train)
    target = batch.targets["brightness"]
    assert (target.dtype, target.shape) == (torch.uint8, (24, SIZE, SIZE))
    largest = (batch.images_BCYX[:, 0].int() - target.int()).abs().max()
    figure(f"{change}, train={train}: largest difference {largest} of 200")
    # Measured 3: the nearest pixel against an antialiased mean; with another flip or crop 100 and more.
    assert largest <= 6


def test_a_rank_without_images_reads_the_same_targets():
    config = replace(CONFIG, crop_scale=[0.3, 1.0], flip=True, random_shift=2)
    with_images, alone = read(Ramps(), config), read(Ramps(), config, images=False)
    assert alone.images_BCYX is None
    for name, target in with_images.targets.items():
        assert torch.equal(target, alone.targets[name])


def test_targets_do_not_change_the_images():
    config = replace(CONFIG, crop_scale=[0.3, 1.0], flip=True, random_shift=2)
    layout = SimpleNamespace(tp_rank=0, tp=1, dp=1, dp_rank=0, pp=1, vpp=1, device=torch.device("cpu"))
    fields = RequiredFields(images=True, targets=("labels",))
    loader = Loader(Ramps(), config, layout=layout, fields=fields, micro_batch=24, seed=3, train=True)
    alone = next(loader.train_batches(0, num_steps=1, global_batch=24))
    assert torch.equal(alone.images_BCYX, read(Ramps(), config).images_BCYX)


def test_targets_of_a_subset_and_of_new_labels_are_those_of_the_source():
    chosen = choose(Ramps(), replace(CONFIG, classes=["down"]), "train")
    for source in (chosen, Relabelled(chosen, [0], ("down",))):
        assert source.dense_targets == Ramps.dense_targets
        assert torch.equal(source.dense_target(3, "brightness"), Ramps().dense_target(7, "brightness"))


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (Digits("train"), {}, "the task needs the dense target brightness, and data.source=ramps has none"),
        (Ramps(), {"transform": "my:own"}, "data.transform=my:own would change an image but not its target brightness"),
        (Ramps(), {"on_bad_sample": OnBadSample.skip}, "data.on_bad_sample=skip replaces a bad image"),
    ],
)
def test_settings_that_change_only_the_image_are_refused(source, change, message):
    with pytest.raises(ConfigError) as error:
        read(source, replace(CONFIG, **change), train=False)
    assert str(error.value).startswith(message)
