"""The same images give the same run, whatever their source."""

import json
import os
from pathlib import Path

import pytest

from tests.data.sources.tars import shard
from tests.distributed import run_ranks

DATA = os.environ.get("MEGAVIT_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEGAVIT_TEST_DATA names no folder of real images")

RUN = [
    "recipe=null", "data=cifar10", "model.hidden_size=32", "model.ffn_size=64", "model.num_heads=4",
    "model.num_layers=2", "model.patch_size=8", "model.drop_path=0.1", "data.crop_scale=[0.5,1]",
    "train.global_batch=32", "optim.lr=1e-3",
    "optim.warmup_steps=10", "metrics.log_every=1", "metrics.tensorboard=false", "checkpoint.best=false",
]  # fmt: skip


def export(folder: Path, counts: dict[str, int]) -> None:
    """Write the first rows of each split as parquet files and, numbered by row, as class folders and as tar shards."""
    import datasets

    for split, count in counts.items():
        file = f"{DATA}/cifar10-{split}.parquet"
        rows = datasets.load_dataset("parquet", data_files=file, split=f"train[:{count}]")
        rows.to_parquet(folder / "rows" / f"{split}.parquet")
        names, part = rows.features["label"].names, {"train": "train", "test": "val"}[split]
        shards: list[dict[str, bytes]] = [{} for _ in range(4)]
        for number, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            path = folder / "files" / part / names[row["label"]] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
            # Distribute the samples over shards, as a writer with several processes does.
            shards[number % len(shards)] |= {
                f"{number}.jpg": row["image"]["bytes"],
                f"{number}.cls": str(row["label"]).encode(),
            }
        for number, members in enumerate(shards):
            shard(folder / "tars" / part / f"{number}.tar", members)
    (folder / "tars" / "classes.txt").write_text("\n".join(names) + "\n")


def train(overrides: list[str]) -> list[tuple]:
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    validate(config, 1)
    Trainer(config).run()
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"], row["top1"]) for row in rows if row["split"] != "save"]


def compare(folder: Path, steps: int, figure) -> None:
    runs = [
        run_ranks(train, 1, [*RUN, f"train.steps={steps}", f"run.dir={folder / name}", *own], timeout_s=600)[0]
        for name, own in {
            "from_rows": [f"data.path={folder / 'rows'}"],
            "from_files": [f"data.path={folder / 'files'}", "data.source=folder"],
            "from_tars": [f"data.path={folder / 'tars'}", "data.source=tar"],
        }.items()
    ]
    assert len(runs[0]) == steps + 1
    assert runs[0] == runs[1] == runs[2]
    for name in ("from_files", "from_tars"):
        assert sorted(path.name for path in (folder / name / "index").iterdir()) == ["train.index", "val.index"]
    figure(f"CIFAR-10 in parquet, as a folder and as tars: {steps} losses and the validation's are identical")


@needs_data
def test_parquet_and_its_exported_folder_and_tars_give_identical_losses(tmp_path, figure):
    export(tmp_path, {"train": 600, "test": 100})
    compare(tmp_path, 60, figure)


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_of_cifar10_in_parquet_as_a_folder_and_as_tars_gives_identical_losses(tmp_path, figure):
    export(tmp_path, {"train": 50_000, "test": 10_000})
    compare(tmp_path, 400, figure)
