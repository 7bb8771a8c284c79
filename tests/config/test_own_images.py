"""Defaults for images of one's own: how often a run validates and saves, how long it warms up, and that it says so."""

import pytest
from PIL import Image

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_num_steps, resolve_pace
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.validate import validate
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from tests import ranks
from tests.distributed import run_ranks

OWN = ("folder", "csv", "images", "parquet", "tar", "arrow", "hub")


def often(config: ExperimentConfig, *, num_samples: int) -> tuple[int, int | None, int | None, int]:
    """Steps, steps between evaluations and saves, and of the warm-up."""
    steps = resolve_num_steps(config, num_samples)
    pace = resolve_pace(config, steps, num_samples=num_samples)
    return steps, pace.eval_every, pace.save_every, pace.warmup_steps


@pytest.mark.parametrize("source", OWN)
def test_a_run_validates_and_saves_once_an_epoch_and_warms_up_for_a_twentieth(source):
    config = compose([f"data={source}", "data.path=/data", "train.epochs=20"])
    # 1,000 images in batches of 64: 15.6 steps an epoch.
    assert often(config, num_samples=1000) == (313, 16, 16, 15)


@pytest.mark.parametrize(
    ("settings", "num_samples", "want"),
    [
        # 300 epochs of 100 steps: 50 evaluations, and 5 epochs of warm-up where 5 % were 15.
        (["train.epochs=300"], 6400, (30000, 600, 600, 500)),
        (["train.steps=101"], 64, (101, 3, 3, 5)),
        (["train.steps=20"], 1_000_000, (20, 20, 20, 1)),
        (["train.steps=19"], 100, (19, 2, 2, 0)),
        (["train.steps=40", "optim.schedule=wsd", "optim.decay_steps=39"], 64, (40, 1, 1, 1)),
        (["train.steps=40", "train.eval_every=null"], 64, (40, None, 1, 2)),
        (["train.steps=40", "checkpoint.save_every=null", "optim.warmup_steps=0"], 64, (40, 1, None, 0)),
        (
            ["train.steps=40", "train.eval_every=7", "checkpoint.save_every=9", "optim.warmup_steps=39"],
            64,
            (40, 7, 9, 39),
        ),
        (["train.steps=2000", "recipe=digits", "data=folder"], 1280, (2000, 300, 40, 100)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_at_most_50_times_at_most_five_epochs_and_what_is_set_holds(settings, num_samples, want):
    config = compose(["data.path=/data", *settings])
    validate(config, 1)
    assert often(config, num_samples=num_samples) == want
    assert from_yaml(to_yaml(config)) == config


def test_the_embedded_digits_keep_the_recipes_numbers():
    assert often(compose([]), num_samples=1437) == (1500, 300, None, 100)
    assert often(compose(["recipe=null", "train.steps=30"]), num_samples=1437) == (30, None, None, 0)
    assert often(compose(["train.eval_every=auto", "checkpoint.save_every=auto"]), num_samples=1437) == (
        1500,
        30,
        30,
        100,
    )


# All 28 take 8 s; these have the longest and the shortest warm-up, of a source with a path and without one.
@pytest.mark.parametrize("recipe", ["digits", "mae_b16_800ep", "mae_b16_probe", "cifar10_mae"])
def test_twenty_steps_of_any_recipe_run_with_a_shorter_warmup(recipe):
    path = ["data.path=/data"] if compose([f"recipe={recipe}"]).data.source != "digits" else []
    config = compose([f"recipe={recipe}", "train.steps=20", *path])
    validate(config, 1)
    assert often(config, num_samples=1_281_167)[3] == 1
    # Of one epoch of few images the length is known once they are counted.
    short = compose([f"recipe={recipe}", "train.epochs=1", *path])
    validate(short, 1)
    steps, _, _, warmup_steps = often(short, num_samples=1000)
    assert warmup_steps == steps // 20


@pytest.mark.parametrize("length", ["train.steps=20", "train.epochs=1"])
def test_a_warmup_that_was_typed_is_not_shortened_but_refused(length):
    config = compose([length, "optim.warmup_steps=100"])
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=100 must be below the run's 20 steps; lower it"):
        resolve_num_steps(config, 1280)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.eval_every=often", "train.eval_every=often must be a number of steps or auto"),
        ("checkpoint.save_every=0", "checkpoint.save_every=0 must be a finite number at least 1"),
        ("optim.warmup_steps=-1", "optim.warmup_steps=-1 must be a finite number at least 0"),
        ("optim.warmup_steps=1.5", "optim.warmup_steps: .*1.5"),
    ],
)
def test_a_number_of_steps_that_is_none_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        validate(compose(["data.path=/data", "train.steps=50", setting]), 1)


def test_more_decaying_steps_than_the_run_has_are_refused():
    with pytest.raises(ConfigError, match=r"optim\.decay_steps=30 is more than the run's 20 steps"):
        validate(compose(["train.steps=20", "optim.schedule=wsd", "optim.decay_steps=30"]), 1)


SMALL = [
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.patch_size=8",
    "data.image_size=[16,16]",
    "data.workers=0",
    "data.val_fraction=0.25",
    "train.global_batch=8",
    "metrics.tensorboard=false",
]


def test_a_run_says_what_it_found_and_how_often_it_saves_and_goes_on_by_the_same_command(tmp_path):
    for name, grey in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(16):
            Image.new("RGB", (20, 20), (grey + number,) * 3).save(tmp_path / "images" / name / f"{number}.png")
    run_dir = tmp_path / "run"
    command = [f"data.path={tmp_path}/images", *SMALL, "train.epochs=7", f"run.dir={run_dir}"]
    run_ranks(ranks.train_evaluate_and_keep, 1, [*command, "train.stop_at=6"])
    done = run_ranks(ranks.train_evaluate_and_keep, 1, command)[0]
    assert done["code"] == 0
    said = (run_dir / "train.log").read_text()
    first = said.splitlines()[:8]
    assert f"data folder {tmp_path}/images: 32 images of 2 classes, 24 for training and 8 for validation" in first
    assert (
        "by default train.eval_every=3 and checkpoint.save_every=3 of 21 steps: once an epoch, at most 50 times a run"
        in first
    )
    assert "by default optim.warmup_steps=1 of 21 steps: 5 %, at most 5 epochs" in first
    assert list(done["validation"]) == list(range(3, 22, 3))
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert [int(name.rpartition("_")[2]) for name in saved] == list(range(3, 22, 3))
    config = from_yaml((run_dir / "config.yaml").read_text())
    assert (config.train.eval_every, config.checkpoint.save_every, config.optim.warmup_steps) == ("auto",) * 3


def test_without_validation_images_a_run_trains_on_all_saves_once_an_epoch_and_paints(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(16):
        Image.new("RGB", (20, 20), (10 * number,) * 3).save(tmp_path / "images" / f"{number}.png")
    small = [text for text in SMALL if not text.startswith("data.val_fraction")]
    own = [f"data.path={tmp_path}/images", "data=images", "task=mae", "task.baseline_samples=4", "data.val_fraction=0"]
    command = [
        *small,
        *own,
        "train.epochs=4",
        "metrics.pictures_every=8",
        "run.preflight=true",
        f"run.dir={tmp_path}/run",
    ]
    done = run_ranks(ranks.train_evaluate_and_keep, 1, command)[0]
    assert (done["code"], done["validation"]) == (0, {})
    assert sorted([*done["due"][0], *done["due"][1]]) == list(range(16))
    said = (tmp_path / "run" / "train.log").read_text()
    assert "16 images, 16 for training and none for validation" in said
    assert "by default checkpoint.save_every=2 of 8 steps" in said
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 4
    assert (tmp_path / "run" / "pictures" / "train_00000008.png").exists()
    with pytest.raises(ConfigError, match=r"data.val_fraction=0 leaves no images of .*images to validate on"):
        open_source(compose(command).data, "val")
    with pytest.raises(ConfigError, match=r"train.eval_every=5 would be ignored: data.val_fraction=0"):
        validate(compose([*command, "train.eval_every=5"]), 1)


def test_a_recipes_shortened_warmup_is_reported(tmp_path):
    from tests.reference import SMALL as DIGITS

    settings = [text for text in DIGITS if not text.startswith("optim.warmup_steps")]
    run_ranks(ranks.train_and_keep, 1, [*settings, "train.steps=2", f"run.dir={tmp_path}"])
    line = "optim.warmup_steps=100 does not fit the run's 2 steps: shortened to 0, at most 5 % of them"
    assert line in (tmp_path / "train.log").read_text().splitlines()
