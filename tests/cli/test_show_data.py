"""`megavit show-data`: a picture of what the network will see, without a network."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from megavit.cli import show_data
from megavit.cli.main import run
from megavit.config.compose import compose
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources.digits import Digits
from megavit.data.transforms.device import DeviceTransforms
from megavit.errors import ConfigError
from megavit.parallel.layout import ParallelLayout
from megavit.task.masking import random_keep
from tests.cli.test_commands import call

MIXED = ["recipe=digits", "data.mixup=0.8", "data.cutmix=1.0", "data.random_erasing=0.5"]


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn."""
    kept: dict = {}
    monkeypatch.setattr(show_data, "draw_samples", lambda rows, *, captions, path: kept.update(rows, captions=captions))
    return kept


def test_it_draws_a_picture_and_prints_its_path(tmp_path, monkeypatch, capsys):
    out = tmp_path / "seen" / "data.png"
    code, output, _ = call(["show-data", *MIXED, f"out={out}", "count=10"], monkeypatch, capsys)
    assert (code, output) == (0, f"{out}: the first 10 of 1,437 training images of data.source=digits\n")
    # Eight in a line: two lines of two rows.
    width, height = Image.open(out).size
    assert 1000 < height * 2 < width * 2 < 4000
    monkeypatch.chdir(tmp_path)
    assert call(["show-data", "recipe=digits", "count=2"], monkeypatch, capsys)[0] == 0
    assert Path("runs/digits/pictures/data.png").exists()


def test_it_shows_the_first_training_images_as_any_micro_batch_has_them(drawn):
    run(["show-data", *MIXED, "count=6"])
    config = compose(MIXED)
    loader = Loader(
        Digits("train"),
        config.data,
        layout=ParallelLayout.alone(),
        fields=RequiredFields(images=True, targets=("labels",)),
        micro_batch=2,
        seed=config.run.seed,
        train=True,
    )
    device = DeviceTransforms(config.data, seed=config.run.seed, device=torch.device("cpu"))
    batches = list(loader.train_batches(0, num_steps=1, global_batch=6))
    trained = torch.cat([device.normalize.undo(device(batch)).clamp(0, 1) * 255 for batch in batches])
    assert torch.equal(torch.stack(drawn["seen"]), trained.round().byte())
    keys = [key for batch in batches for key in batch.keys]
    assert all(
        torch.equal(image, Digits("train").image(key.sample_id))
        for image, key in zip(drawn["original"], keys, strict=True)
    )
    labels = [Digits("train").label(key.sample_id) for key in keys]
    assert drawn["captions"]["original"] == [str(label) for label in labels]
    shares = torch.cat([device.mix(batch).share_B for batch in batches]).tolist()
    for row, caption in enumerate(drawn["captions"]["seen"]):
        assert caption == f"{labels[row]} {shares[row]:.2f}\n+ {labels[row ^ 1]} {1 - shares[row]:.2f}"


def test_of_a_masked_autoencoder_it_shows_what_is_left(drawn):
    run(["show-data", "recipe=digits_mae", "count=3"])
    assert not drawn["captions"]
    config = compose(["recipe=digits_mae"])
    ids = torch.tensor([_place(image) for image in drawn["original"]])
    keep = random_keep(ids, ids * 0, ids * 0, 16, num_kept=4, seed=config.run.seed)
    for image, masked, kept in zip(drawn["seen"], drawn["masked"], keep.tolist(), strict=True):
        for patch in range(16):
            rows, columns = (slice(2 * place, 2 * place + 2) for place in divmod(patch, 4))
            expected = image[:, rows, columns] if patch in kept else torch.full((1, 2, 2), 127)
            assert torch.equal(masked[:, rows, columns], expected.byte())


def _place(image: torch.Tensor) -> int:
    source = Digits("train")
    return next(index for index in range(len(source)) if torch.equal(source.image(index), image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.mixup=0.8", "count=3"], "count=3 is odd, and images are mixed in pairs; set count=4"),
        (["count=0"], "count=0 must be a whole number of at least 1"),
        (["data.mixup=-1"], "data.mixup=-1.0 must be"),
        (["recipe=digits_mae", "data.mixup=0.8"], "data.mixup=0.8 would be ignored by task.name=mae"),
        (["data.mxiup=0.8"], "did you mean data.mixup"),
    ],
)
def test_what_a_run_would_refuse_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(["show-data", *arguments])
