"""Join the launchers of several machines by torch's c10d rendezvous, whose host may start late and exit first."""

from datetime import timedelta

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as dynamic
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

BACKEND = "megavit-c10d"

# Time limit in seconds for the host's start. torch's is 60 s; another machine's imports or its container take longer.
_START_S = 300
# torch's time limit in seconds for an answer of the store (`read_timeout`).
_ANSWER_S = 60


def register_backend() -> str:
    """Register `create_handler` with torch's launcher and return the name of the backend."""
    rendezvous_handler_registry.register(BACKEND, create_handler)
    return BACKEND


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Build c10d's handler, which continues without the store once the ranks run.

    The first machine holds the store and exits as soon as its ranks have exited. torch's agent on another machine
    queries the store ten times a second for machines that wait to join. If its own ranks exit a moment later, the
    missing answer ended the agent with a traceback and code 1 (torch 2.14.1). Without a store no machine can join.

    Args:
        params: the rendezvous's endpoint and options; `read_timeout` is by default 300 s for the start and 60 s later.

    Returns:
        c10d's handler under the name of `BACKEND`.

    Raises:
        RendezvousConnectionError: if no machine hosts the store in time.
    """
    answer_s = params.get_as_int("read_timeout", _ANSWER_S)
    params.config.setdefault("read_timeout", _START_S)
    backend, store = create_backend(params)
    store.set_timeout(timedelta(seconds=answer_s or _ANSWER_S))
    handler = dynamic.create_handler(store, backend, params)
    ask = handler.num_nodes_waiting

    def num_nodes_waiting() -> int:
        try:
            return ask()
        except RendezvousConnectionError:
            return 0

    handler.num_nodes_waiting = num_nodes_waiting  # type: ignore[method-assign]
    handler.get_backend = lambda: BACKEND  # type: ignore[method-assign]
    return handler
