"""Time the start on as many images as ImageNet has, until the first batch, with and without a cached listing.

    python -m benchmarks.index [FOLDER] [source=folder|tar] [images=1300000] [rounds=5]

The benchmark prints one JSON line: medians and extremes in seconds, and for the first batch also in CPU seconds, which
other work on the machine changes little. Each round is a new process, timed from the end of its imports. File names and
pages are in the system's cache, because the data have just been written. The folder's images are hard links to one
photograph-like JPEG per class; the tars' images have a few pixels.
"""

import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

CLASSES = 1000
BATCH = 64
IMAGES_PER_SHARD = 10_000


def make_folder(root: Path, images: int) -> None:
    """Write PATH/train/CLASS/ with an equal part of the images, and PATH/val/CLASS/ with one, named as in ImageNet."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for label in range(CLASSES):
        name = f"n{label:08d}"
        for part, count in (("train", images // CLASSES), ("val", 1)):
            folder = root / part / name
            folder.mkdir(parents=True)
            first = folder / f"{name}_0.JPEG"
            coarse = Image.fromarray(draw.integers(0, 256, (32, 40, 3), dtype=np.uint8))
            coarse.resize((500, 400)).save(first, quality=90)
            for number in range(1, count):
                (folder / f"{name}_{number * 7}.JPEG").hardlink_to(first)


def make_tars(root: Path, images: int) -> None:
    """Write PATH/train/ and PATH/val/ with shards of images and their labels."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 0)).save(encoded, "JPEG")
    for part, count in (("train", images), ("val", CLASSES)):
        (root / part).mkdir(parents=True)
        for start in range(0, count, IMAGES_PER_SHARD):
            with tarfile.open(root / part / f"{start // IMAGES_PER_SHARD:05d}.tar", "w") as tar:
                for number in range(start, min(count, start + IMAGES_PER_SHARD)):
                    for ending, content in (("jpg", encoded.getvalue()), ("cls", str(number % CLASSES).encode())):
                        member = tarfile.TarInfo(f"{number:08d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def start(source: str, path: str, index: str) -> dict[str, float]:
    """Return the seconds of one start until both splits are open, and until the first batch is loaded."""
    import torch

    from megavit.config.compose import compose
    from megavit.data.loader import Loader, RequiredFields
    from megavit.data.sources.open import open_source

    config = compose([f"data={source}", f"data.path={path}", "data.workers=0"]).data
    layout = SimpleNamespace(tp=1, tp_rank=0, pp=1, vpp=1, dp=1, dp_rank=0, device=torch.device("cpu"), groups=None)
    begun, worked = time.perf_counter(), time.process_time()
    train, _ = (open_source(config, split, index=Path(index)) for split in ("train", "val"))
    opened = time.perf_counter()
    fields = RequiredFields(images=True, targets=("labels",))
    loader = Loader(train, config, layout=layout, fields=fields, micro_batch=BATCH, seed=0, train=True)
    next(loader.train_batches(0, num_steps=1, global_batch=BATCH))
    return {
        "open": opened - begun,
        "first_batch": time.perf_counter() - begun,
        "first_batch_cpu": time.process_time() - worked,
        "images": len(train),
    }


def main(arguments: list[str]) -> None:
    """Write the data, time `rounds` starts with and without the cached listing, and print the JSON line."""
    from megavit.metrics.provenance import provenance

    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    source, rounds = given.get("source", "folder"), int(given.get("rounds", 5))
    where = next((argument for argument in arguments if "=" not in argument), None)
    root = Path(tempfile.mkdtemp(dir=where, prefix="megavit_bench_"))
    seconds: dict[str, list[float]] = {}
    try:
        begun = time.perf_counter()
        make = {"folder": make_folder, "tar": make_tars}[source]
        make(root / "data", int(given.get("images", 1_300_000)))
        print(f"made in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        # A listing is not cached for folders that changed within the last two seconds.
        time.sleep(3)
        for _ in range(rounds):
            shutil.rmtree(root / "index", ignore_errors=True)
            for kind in ("built", "kept"):
                command = [sys.executable, "-m", "benchmarks.index", "--start", source, root / "data", root / "index"]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                measured = json.loads(answer)
                images = measured.pop("images")
                for name, value in measured.items():
                    seconds.setdefault(f"{kind}_{name}_s", []).append(value)
        index_bytes = sum(file.stat().st_size for file in (root / "index").iterdir())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    rows = {
        name: {"median": statistics.median(some), "min": min(some), "max": max(some)} for name, some in seconds.items()
    }
    output = {"bench": "index", "source": source, "images": images, "index_bytes": index_bytes, "rounds": rounds}
    print(json.dumps({**output, **rows, **provenance()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps(start(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
