"""Write a rank's shards: Megatron-Core plans them, this module copies them to host memory and writes them in threads.

Megatron-Core 0.16.1 forks a process per file. The fork copies one thread of a process that also runs threads of gloo,
autograd and the loader: a lock held by another thread stays locked in the child, and the save hangs. It also starts a
manager process, which takes 5 s, for a queue of results that only this process uses. And if its first rank cannot
write a file, the others wait for it in the next collective; this module writes nothing between two collectives.
"""

import io
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megavit.checkpoint.manifest import Entry, describe
from megavit.parallel.megatron_patches import use_local_queue

T = TypeVar("T")

_BACKEND, _VERSION = "torch_dist", 1
_COMMON = "common.pt"


@dataclass(frozen=True)
class Written:
    """The files and tensors that one rank has written.

    Attributes:
        tensors: location of each tensor, for the checkpoint's metadata.
        files: size and sha256 of each file, by name.
    """

    tensors: list[Any]
    files: dict[str, Entry]


class ShardWriter:
    """Write this rank's part of one checkpoint.

    All ranks construct it together; its content is then fixed, and writing waits for no other rank.

    Args:
        state: this rank's state from `shards.sharded_state`.
        folder: existing empty target folder.
        copy_to_host: copy tensors that training would change before they are written.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, copy_to_host: bool) -> None:
        self.folder = folder
        use_local_queue()
        live = _memory(state) if copy_to_host else set()
        shards, common = save_preprocess(state)
        self._plan, self._metadata = _Planning(_BACKEND, _VERSION).async_save(shards, folder)
        self._common = _pickled(common) if dist.get_rank() == 0 else None
        self._buckets = [
            (path, name, (objects, [(item, _staged(tensor, live)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in self._plan.write_buckets
        ]

    def start(self) -> Future[Written]:
        """Start writing in threads; the future raises a write error as OSError."""
        return in_background(self._write)

    def write_metadata(self, everyone: list[Written]) -> None:
        """Write the metadata that joins the ranks' files; rank 0 calls this after all ranks have written theirs."""
        self._plan.finish(self._metadata, [written.tensors for written in everyone])
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self.folder))

    def _write(self) -> Written:
        names = [name for _, name, _ in self._buckets]
        if self._common is not None:
            (self.folder / _COMMON).write_bytes(self._common)
            names.append(_COMMON)
        with ThreadPoolExecutor(max(1, len(self._buckets)), thread_name_prefix="shards") as threads:
            files = threads.map(lambda bucket: _write_file(bucket, self._plan.transforms), self._buckets)
            tensors = [entry for file in files for entry in file]
        # Every rank reads its own files back, in parallel.
        return Written(tensors, describe(self.folder, names))


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run a function in a new thread."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    outcome = thread.submit(work)
    thread.shutdown(wait=False)
    return outcome


class _Planning(TorchDistSaveShardedStrategy):
    """Plan what each rank writes, with Megatron-Core's save strategy."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: tuple[Any, Any, Any]) -> Any:
        _, metadata, _ = planned
        return writer, metadata


def _memory(state: dict[str, Any]) -> set[int]:
    """Return the storages of a state's tensors; Megatron-Core copies slices, but not full tensors."""
    shards = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
    return {shard.data.untyped_storage().data_ptr() for shard in shards if shard.data is not None}


def _staged(tensor: Tensor, live: set[int]) -> Tensor:
    """Return a copy of a tensor in host memory that nothing else refers to."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live and tensor.is_cpu else tensor.cpu()


def _write_file(bucket: Any, transforms: Any) -> list[Any]:
    """Write one file and sync it; return an entry for each of its tensors."""
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    pending.put(0)
    FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, answers, pending, use_fsync=True)
    _, written = answers.get()
    if isinstance(written, Exception):
        raise _cause(written)
    return written


def _cause(error: BaseException) -> BaseException:
    """Return the OSError behind an error of torch's writer (2.15)."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _pickled(common: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()
