"""Writing shards without child processes, for a save that the training waits for.

Megatron-Core 0.16.1 forks a process per file, also then. The fork copies one thread of a process that runs gloo's,
autograd's and the loader's: a lock that another thread held stays locked in the child for ever, and the save hangs; and
it starts a manager process, 5 s, to hold a queue of results that never leaves this process.
"""

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def write_in_threads() -> None:
    """Have Megatron-Core's saves write their files in threads of this process."""
    filesystem_async._results_queue = queue.Queue()
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write)


def _write(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: "queue.Queue[Any]") -> None:
    """Write every bucket to its file; puts {bucket number: write results} into `results`, or the first error."""
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()

    def write(number: int) -> None:
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, buckets[number], answers, pending, use_fsync=True, use_msc=use_msc
        )

    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as threads:
        list(threads.map(write, range(len(buckets))))
    written = dict(answers.get() for _ in buckets)
    errors = [outcome for outcome in written.values() if isinstance(outcome, Exception)]
    results.put(errors[0] if errors else written)
