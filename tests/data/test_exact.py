"""Each sample occurs once per epoch with the same pixels, however often the number of ranks changes."""

from collections import Counter

from tests.data.hashing import hashes, train_and_hash
from tests.distributed import run_ranks
from tests.reference import SMALL

# 80 images are five steps of 16: every stop is in mid-epoch.
IMAGES = 80
EVERYTHING = [
    "task.implementation=tests.data.hashing:Hashing", "task.label_smoothing=0.1", "data.samples_per_class=8",
    "data.random_shift=1", "data.random_erasing=0.25", "data.mixup=0.8", "data.cutmix=1",
    "train.steps=14", "checkpoint.best=false",
]  # fmt: skip


def test_across_1_4_2_and_1_ranks_with_any_workers_each_image_comes_once_and_the_same(tmp_path, figure):
    full = [*SMALL, *EVERYTHING, f"run.dir={tmp_path / 'full'}"]
    run_ranks(train_and_hash, 1, full, tmp_path / "straight")
    parts = [(1, 0, 3), (4, 2, 6), (2, 4, 9), (1, 2, None)]
    for world_size, workers, stop_at in parts:
        own = [f"run.dir={tmp_path / 'parts'}", f"data.workers={workers}", f"train.stop_at={stop_at or 'null'}"]
        run_ranks(train_and_hash, world_size, [*SMALL, *EVERYTHING, *own], tmp_path / "changing")
    straight, changing = hashes(tmp_path / "straight"), hashes(tmp_path / "changing")
    assert changing == straight
    assert len(straight) == 14 * 16
    times = Counter((epoch, sample_id) for epoch, sample_id, _ in straight)
    assert set(times.values()) == {1}
    assert Counter(epoch for epoch, _ in times) == {0: IMAGES, 1: IMAGES, 2: 14 * 16 - 2 * IMAGES}
    figure(f"DP 1 → 4 → 2 → 1, workers 0, 2, 4, 2: {len(straight)} mixed and erased images, each once and the same")
