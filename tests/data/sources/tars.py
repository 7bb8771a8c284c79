"""Write tar shards for tests, valid and broken ones."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def png(value: int) -> bytes:
    """Return an image whose first pixel is its number."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes | tarfile.TarInfo], **options) -> Path:
    """Write a tar of files by name; a TarInfo is added as it is, without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def labelled(numbers, *, label=lambda number: number % 3, by="cls") -> dict[str, bytes]:
    """Return samples by number, as WebDataset writes them."""
    members = {}
    for number in numbers:
        members[f"{number:06d}.png"] = png(number)
        output = str(label(number)).encode() if by == "cls" else json.dumps({"label": label(number)}).encode()
        members[f"{number:06d}.{by}"] = output
    return members
