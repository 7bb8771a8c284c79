"""Convert weights between megavit's runs and other libraries' files (`megavit convert from=… to=…`)."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from megavit.checkpoint.convert.hf_hub import push
from megavit.cli.arguments import argument
from megavit.data.config import PIXEL_SETTINGS
from megavit.inference.convert import check_push, convert_weights
from megavit.runtime.run_dir import FINISHED

# Constant of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class ConvertArgs:
    """The command's own arguments; one of `from` and `to` is a run, the other KIND:PATH.

    Attributes:
        from_: RUN or ema:RUN, or timm:FILE, hf:FOLDER_OR_ID, mae:FILE, nemo:FILE.
        to: timm:FILE, hf:FOLDER, mae:FILE, nemo:FILE, or RUN.
        dtype: fp32, bf16 or fp16: type of the weights written for another library; fp32 if not given.
        num_heads: attention heads of another library's weights, if the files do not state them.
        push: with to=hf:FOLDER, the repository on the Hugging Face hub to upload to.
    """

    SETTINGS: ClassVar = PIXEL_SETTINGS
    from_: str = argument(form="RUN|KIND:PATH")
    to: str = argument(form="KIND:PATH|RUN")
    dtype: str | None = argument(None, form="fp32|bf16|fp16")
    num_heads: int | None = argument(None, form="N")
    push: str | None = argument(None, form="ORG/NAME")


def convert(args: ConvertArgs, settings: list[str]) -> int:
    """Convert weights in the direction that the arguments give.

    Args:
        args: the command's own arguments.
        settings: `PIXEL_SETTINGS` that another library's files do not state, as `key=value`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if the source cannot be read, or the target cannot hold its weights.
    """
    check_push(args.push, args.to)
    _return_freed_memory()
    converted = convert_weights(args.from_, args.to, dtype=args.dtype, num_heads=args.num_heads, pixels=settings)
    print(*converted.notes, sep="\n")
    if args.push is not None:
        push(converted.path, args.push)
    return FINISHED


def _return_freed_memory() -> None:
    """Make glibc return freed tensors' memory; it would keep those up to 32 MB, which are half a model's size."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
