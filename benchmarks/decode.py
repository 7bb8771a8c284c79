"""Time loading photographs into uint8 batches of random, mirrored 224×224 crops, with megavit's loader and others.

    python -m benchmarks.decode [rounds=5] [images=600] [workers=0,1,2] [mosaic=1]

The photographs are those of MEGAVIT_TEST_DATA/imagenet_sample. With mosaic=8 they are pasted, 8 by 8, into images of
4000×3000 pixels, the size of a camera's. In each round every candidate reads the same files in micro batches of 50,
with one thread per process. CPU seconds are user and system time of this process and its workers. The benchmark prints
a readable line and a JSON line for each candidate: medians and extremes of images per CPU second, of images per second,
and of the ratios of images per CPU second to two other candidates' in the same round.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from megavit.config.compose import compose
from megavit.data.loader import Loader
from megavit.data.prefetch import RequiredFields
from megavit.data.sources.base import Source
from megavit.data.sources.open import open_source
from megavit.metrics.provenance import provenance

MICRO_BATCH, SIZE, SCALE, BICUBIC = 50, 224, (0.08, 1.0), InterpolationMode.BICUBIC
# Maps a folder with the photographs in train/, their paths in the order of loading, and a number of workers to batches.
Candidate = Callable[[Path, list[str], int], Iterator[Any]]
crop_and_flip = v2.Compose(
    [v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
)
# The transform of timm's own loader: uint8, because its prefetcher normalises on the device.
timm_transform = create_transform(
    SIZE, is_training=True, use_prefetcher=True, scale=SCALE, hflip=0.5, color_jitter=None, interpolation="bicubic"
)


def by_pillow(path: str) -> torch.Tensor:
    """Decode with Pillow, and crop Pillow's image with torchvision v2."""
    return v2.functional.pil_to_tensor(crop_and_flip(Image.open(path).convert("RGB")))


def by_decode_jpeg(path: str) -> torch.Tensor:
    """Decode with torchvision, and crop its tensor with torchvision v2."""
    return crop_and_flip(decode_jpeg(read_file(path), mode=ImageReadMode.RGB))


def by_timm(path: str) -> torch.Tensor:
    """Decode with Pillow, and apply timm's transform."""
    return timm_transform(Image.open(path).convert("RGB"))


class Files(Dataset):
    """A dataset that applies a function to each file."""

    def __init__(self, paths: list[str], read: Callable[[str], torch.Tensor]) -> None:
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.read(self.paths[index]), index


def plainly(read: Callable[[str], torch.Tensor]) -> Candidate:
    """Return a candidate that calls a function in torch's DataLoader."""
    return lambda _, paths, workers: iter(DataLoader(Files(paths, read), MICRO_BATCH, num_workers=workers))


def by_megavit(**changes: Any) -> Candidate:
    """Return a candidate that uses megavit's loader."""
    config = compose(["data=imagenet1k", "data.source=images", "recipe=null"]).data
    layout = SimpleNamespace(tp=1, tp_rank=0, pp=1, vpp=1, dp=1, dp_rank=0, device=torch.device("cpu"), groups=None)

    @cache
    def opened(folder: Path) -> Source:
        # Open the source once, as a run does: listing the files is not part of loading.
        return open_source(replace(config, path=str(folder)), "train")

    def load(folder: Path, paths: list[str], workers: int) -> Iterator[Any]:
        here = replace(config, path=str(folder), workers=workers, **changes)
        loader = Loader(
            opened(folder),
            here,
            layout=layout,
            fields=RequiredFields(images=True),
            micro_batch=MICRO_BATCH,
            seed=0,
            train=True,
        )
        return loader.train_batches(0, num_steps=len(paths) // MICRO_BATCH, global_batch=MICRO_BATCH)

    return load


CANDIDATES = {
    "Pillow + v2": plainly(by_pillow),
    "decode_jpeg + v2": plainly(by_decode_jpeg),
    "decode_jpeg + v2, no loader": lambda _, paths, workers: map(by_decode_jpeg, paths),
    "timm": plainly(by_timm),
    "megavit": by_megavit(),
    "megavit, reduced_decode=false": by_megavit(reduced_decode=False),
}

COMPARED_WITH = {"cpu_ratio_to_pillow": "Pillow + v2", "cpu_ratio_to_decode_jpeg": "decode_jpeg + v2"}


def measure(batches: Callable[[], Iterator[Any]], num_images: int) -> tuple[float, float]:
    """Return images per CPU second of this process and its children, and images per second."""
    cpu, start = cpu_seconds(), time.perf_counter()
    for _ in batches():
        pass
    return num_images / (cpu_seconds() - cpu), num_images / (time.perf_counter() - start)


def cpu_seconds() -> float:
    """Return user and system seconds of this process and of the workers that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def mosaics(paths: list[str], side: int, folder: Path) -> list[str]:
    """Write twelve mosaics of side × side photographs of 500×375 pixels each."""
    tiles = [Image.open(path).convert("RGB").resize((500, 375)) for path in paths]
    written = []
    for number in range(12):
        picture = Image.new("RGB", (500 * side, 375 * side))
        for place in range(side * side):
            tile = tiles[(number * 17 + place) % len(tiles)]
            picture.paste(tile, (500 * (place % side), 375 * (place // side)))
        written.append(str(folder / f"{number}.jpg"))
        picture.save(written[-1], quality=90)
    return written


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Return median and extremes."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def main(arguments: list[str]) -> None:
    """Run the benchmark, and print the rows."""
    given = dict(argument.split("=", 1) for argument in arguments)
    rounds, num_images, side = int(given.get("rounds", 5)), int(given.get("images", 600)), int(given.get("mosaic", 1))
    torch.set_num_threads(1)
    root = Path(os.environ["MEGAVIT_TEST_DATA"]) / "imagenet_sample"
    found = sorted(str(path) for path in root.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="megavit_bench_") as temporary:
        folder = Path(temporary)
        (folder / "pasted").mkdir()
        some = found if side == 1 else mosaics(found, side, folder / "pasted")
        for half in ("train", "val"):
            (folder / half).symlink_to(root if side == 1 else folder / "pasted")
        paths = [some[index % len(some)] for index in range(num_images // MICRO_BATCH * MICRO_BATCH)]
        rows = [
            (name, workers)
            for workers in map(int, given.get("workers", "0,1,2").split(","))
            for name in CANDIDATES
            # Without a loader there are no workers, and photographs of the original size are never decoded reduced.
            if not (name.endswith("no loader") and workers) and not (name.endswith("=false") and side == 1)
        ]
        measured: dict[tuple[str, int], list[tuple[float, float]]] = {row: [] for row in rows}
        for number in range(rounds):
            for name, workers in rows[number % len(rows) :] + rows[: number % len(rows)]:
                batches = partial(CANDIDATES[name], folder, paths, workers)
                measured[name, workers].append(measure(batches, len(paths)))
    output = provenance()
    output["versions"] |= {package: version(package) for package in ("Pillow", "timm")}
    for (name, workers), rates in measured.items():
        per_cpu, per_wall = [rate for rate, _ in rates], [rate for _, rate in rates]
        ratios = {
            key: [own / theirs for own, (theirs, _) in zip(per_cpu, measured[other, workers], strict=True)]
            for key, other in COMPARED_WITH.items()
        }
        row = {
            "images_per_cpu_s": spread(per_cpu, 1),
            "images_per_s": spread(per_wall, 1),
            **{key: spread(ratio, 2) for key, ratio in ratios.items()},
        }
        figures = "  ".join(f"{key} {v['median']} ({v['min']} to {v['max']})" for key, v in row.items())
        print(f"{name:30} {workers} workers  {figures}")
        settings = {"rounds": rounds, "images": len(paths), "mosaic": side}
        print(json.dumps({"bench": "decode", "candidate": name, "workers": workers, **settings, **row, **output}))


if __name__ == "__main__":
    main(sys.argv[1:])
