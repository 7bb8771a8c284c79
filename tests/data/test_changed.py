"""A dataset that changes before its run is resumed."""

from pathlib import Path

from PIL import Image

from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL


def test_a_run_resumed_with_fewer_images_warns_about_their_order(tmp_path):
    for label in "ab":
        for number in range(20):
            path = tmp_path / "images" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((8, 8), 60).convert("RGB").save(path)
    own = [
        *SMALL,
        f"data.path={tmp_path / 'images'}",
        "data.val_fraction=0.2",
        "data.image_size=[8,8]",
        "data.workers=0",
    ]
    settings = [*own, "model=vit_ti16", "model.patch_size=4", *SMALL[:4], f"run.dir={tmp_path / 'run'}"]

    def log() -> str:
        return (Path(tmp_path) / "run" / "train.log").read_text()

    run_ranks(ranks.train_and_keep, 1, [*settings, "train.stop_at=3"])
    run_ranks(ranks.train_and_keep, 1, [*settings, "train.stop_at=4"])
    assert "training images" not in log()
    # The listing that the second start used, which is no longer valid at the third.
    assert (tmp_path / "run" / "index" / "all.index").is_file()
    for path in (tmp_path / "images" / "a").glob("1*.png"):
        path.unlink()
    run_ranks(ranks.train_and_keep, 1, settings)
    assert log().count("the run had 32 training images and has ") == 1
