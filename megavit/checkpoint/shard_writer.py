"""A rank's shards: planned by Megatron-Core, copied into the host's memory, written by threads of this process.

Megatron-Core 0.16.1 forks a process per file. The fork copies one thread of a process that runs gloo's, autograd's and
the loader's: a lock that another thread held stays locked in the child for ever, and the save hangs; and it starts a
manager process, 5 s, to hold a queue of results that never leaves this process. And where its first rank cannot write a
file, the others wait for it in the next collective: here nothing is written between two collectives.
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
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megavit.checkpoint.manifest import Entry, describe

T = TypeVar("T")

_BACKEND, _VERSION = "torch_dist", 1
_COMMON = "common.pt"


@dataclass(frozen=True)
class Written:
    """What one rank has written.

    Attributes:
        tensors: where each is, for the checkpoint's metadata.
        files: size and sha256 of each file, by name.
    """

    tensors: list[Any]
    files: dict[str, Entry]


class ShardWriter:
    """This rank's part of one checkpoint.

    Every rank makes one together; what it will write is then fixed, and the writing waits for no other rank.

    Args:
        state: from `shards.sharded_state`.
        folder: where to; exists and is empty.
        copy_to_host: copy what the training would change before it is written.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, copy_to_host: bool) -> None:
        self.folder = folder
        # Else a process would be started to hold one.
        filesystem_async._results_queue = queue.Queue()
        live = _memory(state) if copy_to_host else set()
        shards, common = save_preprocess(state)
        self._plan, self._metadata = _Planning(_BACKEND, _VERSION).async_save(shards, folder)
        self._common = _pickled(common) if dist.get_rank() == 0 else None
        self._buckets = [
            (path, name, (objects, [(item, _staged(tensor, live)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in self._plan.write_buckets
        ]

    def start(self) -> Future[Written]:
        """Write in threads; what the disk has against it comes out of the result as OSError."""
        return in_background(self._write)

    def write_metadata(self, everyone: list[Written]) -> None:
        """Write what makes the ranks' files one checkpoint; rank 0 calls this once all have written theirs."""
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
        # Each rank reads its own back, all at once.
        return Written(tensors, describe(self.folder, names))


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do something in a thread of its own."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    outcome = thread.submit(work)
    thread.shutdown(wait=False)
    return outcome


class _Planning(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy as far as what each rank writes where."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: tuple[Any, Any, Any]) -> Any:
        _, metadata, _ = planned
        return writer, metadata


def _memory(state: dict[str, Any]) -> set[int]:
    """Where the tensors of a state lie; what Megatron-Core cuts out of them it copies, whole ones it does not."""
    shards = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
    return {shard.data.untyped_storage().data_ptr() for shard in shards if shard.data is not None}


def _staged(tensor: Tensor, live: set[int]) -> Tensor:
    """A tensor in the host's memory, and nobody else's."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live and tensor.is_cpu else tensor.cpu()


def _write_file(bucket: Any, transforms: Any) -> list[Any]:
    """Write one file and sync it; an entry for each of its tensors."""
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    pending.put(0)
    FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, answers, pending, use_fsync=True)
    _, written = answers.get()
    if isinstance(written, Exception):
        raise _cause(written)
    return written


def _cause(error: BaseException) -> BaseException:
    """The disk's own error, where torch's writer has tripped over it and fallen (2.15)."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _pickled(common: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()
