"""A classifier that records a hash of every training image in the network's input, mixed and erased."""

import hashlib
import os
from pathlib import Path

from megavit.task.classification import ClassificationTask


class Hashing(ClassificationTask):
    """Append a line with key and hash of each image to a file of this process in the folder HASHES."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        preprocess, folder = self.preprocess, Path(os.environ["HASHES"])
        folder.mkdir(parents=True, exist_ok=True)

        class Seen:
            mix = staticmethod(preprocess.mix)

            def __call__(self, batch):
                images = preprocess(batch)
                if batch.augmented:
                    hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
                    rows = [
                        f"{key.epoch} {key.sample_id} {key.occurrence} {text}\n"
                        for key, text in zip(batch.keys, hashes, strict=True)
                    ]
                    # One write, so that a killed process leaves no partial line.
                    with (folder / str(os.getpid())).open("ab", buffering=0) as file:
                        file.write("".join(rows).encode())
                return images

        self.preprocess = Seen()


def train_and_hash(settings: list[str], folder: Path) -> dict:
    """Train as one rank and record the hashes in a folder."""
    from tests import ranks

    os.environ["HASHES"] = str(folder)
    return ranks.train_and_keep(settings)


def hashes(folder: Path) -> dict[tuple[int, ...], str]:
    """What was left, by epoch, sample and occurrence.

    Raises:
        AssertionError: if an image was not always the same.
    """
    seen: dict[tuple[int, ...], str] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            *key, text = line.split()
            assert seen.setdefault(tuple(map(int, key)), text) == text, f"{key} was two images"
    return seen
