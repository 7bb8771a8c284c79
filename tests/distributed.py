"""`run_ranks`: a function on N gloo processes, from an ordinary test.

The processes are started once and reused, so that a distributed test costs its own work and not the imports. Two
servers that have imported the trainer fork them: neighbouring ranks have different hash seeds, as the ranks of a run
have, because the order of a set must not decide what they communicate.
"""

import atexit
import gc
import importlib
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

from megavit.runtime.startup import gc_paused


class RankFailed(AssertionError):
    """A rank raised or did not answer; the message holds every rank's stack."""


class _Pool:
    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []
        self.servers = [forkserver.ForkServer() for _ in range(2)]
        for server in self.servers:
            server.set_forkserver_preload(["tests.preloaded"])

    def grow(self, ranks: int) -> None:
        context = mp.get_context("forkserver")
        while len(self.workers) < ranks:
            server = self.servers[len(self.workers) % len(self.servers)]
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
                process.start()
            theirs.close()
            self.workers.append((process, ours))

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers.clear()


_pool = _Pool()
atexit.register(_pool.stop)


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Run a module-level function on every rank of a world of CPU processes.

    Args:
        function: importable by name; finds the world in the environment, as under torchrun.
        ranks: size of the world.
        arguments: passed to it, pickled.
        timeout_s: after which the ranks are ended and the call fails.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailed: if one raised, or none answered in time.
    """
    _pool.grow(ranks)
    # Held by this process, as torchrun's agent holds it: a port that is only looked up may be another's a moment later.
    store = open_store()
    workers = _pool.workers[:ranks]
    for rank, (_, pipe) in enumerate(workers):
        pipe.send((function.__module__, function.__qualname__, arguments, rank, ranks, store.port))
    answers: dict[int, tuple[bool, Any]] = {}
    pending: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
    # One rank's failure leaves the others waiting for it: give them a moment, then end them.
    patience, died = timeout_s, False
    while pending:
        ready: list[Any] = wait(list(pending), timeout=patience)
        if not ready:
            break
        for answering in ready:
            rank = pending.pop(answering)
            try:
                answers[rank] = answering.recv()
            except EOFError:
                answers[rank] = (False, "the process died")
                died = True
            if not answers[rank][0]:
                patience = min(patience, 5)
    failed = {rank: answer for rank, (good, answer) in sorted(answers.items()) if not good}
    if pending or died:
        _pool.stop()
    if pending or failed:
        silent = "".join(f"\nrank {rank}: no answer" for rank in pending.values())
        raise RankFailed("".join(f"\nrank {rank}:\n{stack}" for rank, stack in failed.items()) + silent)
    return [answers[rank][1] for rank in range(ranks)]


def _serve(pipe: Connection) -> None:
    os.environ["MEGAVIT_DEVICE"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    # Else this process's own would be spawned too: a loading worker starts in 2 s then, and in a run by a fork.
    mp.set_start_method("fork", force=True)
    while True:
        try:
            module, name, arguments, rank, ranks, port = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE="1000",  # one thread each
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        try:
            with gc_paused():
                function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = (True, function(*arguments))  # type: ignore[operator]
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        _leave_world()


def _leave_world() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    # Megatron-Core's wrapper stays alive through hooks that the garbage collector cannot see, and with it every process
    # group and gloo's polling threads, some 50 a test: 1,700 threads made the machine ten times slower (0.16.1). Nobody
    # uses it any more, so it is emptied by hand.
    # By type, not isinstance: that looks into weak proxies, of which torch.compile leaves dead ones.
    for wrapper in [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]:
        wrapper.__dict__.clear()
    gc.collect()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def open_store() -> Any:
    """Where ranks meet, on a port of its own; they find it in the environment, beside TORCHELASTIC_USE_AGENT_STORE."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
