"""Index the samples of a tar, as WebDataset groups them, by reading its headers once."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from megavit.data.sources.list_files import SUFFIXES
from megavit.errors import ConfigError, printable

_ENDINGS = tuple(suffix[1:] for suffix in SUFFIXES)

# Labels count from 0, and each up to the largest becomes a class; a larger label is taken for a mistake.
_MAX_LABEL = 1_000_000

# Number of bytes after the end that must be zero: tar pads its last record, usually of 10,240 bytes, with zeros.
_TRAILER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Placed:
    """One image.

    Attributes:
        name: path of the member, without a leading ./
        offset: position of the first byte in the tar.
        size: size in bytes.
        label: the label; None for no label.
    """

    name: str
    offset: int
    size: int
    label: int | None


@dataclass
class _Sample:
    endings: set[str] = field(default_factory=set)
    image: tuple[str, int, int] | None = None
    label: int | None = None


def read_headers(file: IO[bytes], shard: str) -> list[Placed]:
    """Return the images of a tar, in its order.

    A sample's members share their path up to the first dot of the file name: an image, and `.cls`, an integer, or
    `.json` with an integer "label". Other members, hidden members and members of hidden folders are skipped.

    Args:
        file: the tar, not compressed.
        shard: path of the tar, for errors.

    Raises:
        ConfigError: if the tar is incomplete, has members that are neither files nor folders or are outside it, or if a
            sample has two images, a label without an image, a member twice, or a label that is not an integer.
    """
    samples: dict[str, _Sample] = {}
    try:
        for member in _members(file, shard):
            _add(member, file, samples, shard)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{shard} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # Any exception: tarfile takes numbers, text and recursion depth from the file.
        raise ConfigError(f"{shard} cannot be read as a tar: {error}; is it complete, and not compressed?") from error
    placed = []
    for key, sample in samples.items():
        if sample.image is not None:
            placed.append(Placed(*sample.image, label=sample.label))
        elif any(ending in ("cls", "json") or ending.endswith(_ENDINGS) for ending in sample.endings):
            has = ", ".join(f".{ending}" for ending in sorted(sample.endings))
            raise ConfigError(
                f"{shard}: the sample {printable(key)} has no image, but {printable(has)}; a sample's name ends at the "
                f"first dot, and an image ends in one of {', '.join(SUFFIXES)}"
            )
    return placed


def _members(file: IO[bytes], shard: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar, each checked before the next is read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            # tarfile would store all members, a kilobyte each.
            tar.members = []  # type: ignore[attr-defined]
            _refuse_unsafe(member, shard)
            if not 0 <= member.size <= size - member.offset_data:
                raise ConfigError(
                    f"{shard} ends within {printable(member.name)}, at {size:,} of "
                    f"{member.offset_data + member.size:,} bytes; copy it again"
                )
            if member.isfile():
                yield member
        end = tar.offset
    file.seek(end)
    trailer = file.read(_TRAILER_BYTES)
    if len(trailer) < tarfile.BLOCKSIZE:
        raise ConfigError(f"{shard} ends at {size:,} bytes without tar's end marker: part is missing; copy it again")
    if trailer.strip(b"\0"):
        raise ConfigError(f"{shard} has an unreadable header at byte {end:,}, before its end; copy or pack it again")


def _refuse_unsafe(member: tarfile.TarInfo, shard: str) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(
            f"{shard}: the member {printable(name)} is outside the tar; pack it again with paths within a folder"
        )
    if member.issparse() or not (member.type in tarfile.REGULAR_TYPES or member.isdir()):
        kinds = {
            tarfile.SYMTYPE: "a link",
            tarfile.LNKTYPE: "a link",
            tarfile.CHRTYPE: "a device",
            tarfile.BLKTYPE: "a device",
            tarfile.FIFOTYPE: "a pipe",
        }
        kind = "a sparse file" if member.issparse() else kinds.get(member.type, f"of type {member.type!r}")
        raise ConfigError(
            f"{shard}: the member {printable(name)} is {kind}; a shard may contain only files, pack it again without "
            f"(tar -h follows links)"
        )


def _add(member: tarfile.TarInfo, file: IO[bytes], samples: dict[str, _Sample], shard: str) -> None:
    name = member.name
    while name.startswith("./"):
        name = name[2:]
    folder, slash, file_name = name.rpartition("/")
    stem, dot, ending = file_name.partition(".")
    if not dot or name.startswith(".") or "/." in name:
        return
    key, ending = f"{folder}{slash}{stem}", ending.lower()
    sample = samples.setdefault(key, _Sample())
    if ending in sample.endings:
        raise ConfigError(
            f"{shard}: {printable(key)}.{printable(ending)} exists twice; a sample may have one member of each ending"
        )
    sample.endings.add(ending)
    if ending in _ENDINGS:
        if sample.image is not None:
            raise ConfigError(
                f"{shard}: the sample {printable(key)} has two images, {printable(sample.image[0])} and "
                f"{printable(name)}; keep one"
            )
        sample.image = (name, member.offset_data, member.size)
    elif ending in ("cls", "json"):
        file.seek(member.offset_data)
        label = _label(file.read(member.size), ending, f"{shard}: {printable(name)}")
        if label is not None:
            if sample.label not in (None, label):
                raise ConfigError(f"{shard}: the sample {printable(key)} has two labels, {sample.label} and {label}")
            sample.label = label


def _label(content: bytes, ending: str, name: str) -> int | None:
    """Return the label in a member; None for a .json without one."""
    if ending == "cls":
        text = content.strip()
        # int() alone would accept 1_0, +1 and the digits of other scripts.
        label: object = (
            int(text) if text.isdigit() and len(text) < 20 else text.decode("utf-8", "backslashreplace")[:40]
        )
    else:
        try:
            about = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name} cannot be read as JSON: {error}") from error
        label = about.get("label") if isinstance(about, dict) else None
        if label is None:
            return None
    if type(label) is not int or not 0 <= label < _MAX_LABEL:
        raise ConfigError(f"{name} has the label {label}; labels are integers from 0 to {_MAX_LABEL - 1:,}")
    return label
