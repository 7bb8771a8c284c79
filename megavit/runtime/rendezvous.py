"""Where the launchers of several machines meet: torch's c10d rendezvous, whose host may come late and leave first."""

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

# torch waits a minute for the host; another machine's imports or its container may take longer.
_START_S = 300
# What torch waits for an answer of the store (`read_timeout`).
_ANSWER_S = 60


def register_backend() -> str:
    """Register `create_handler` with torch's launcher and return the name of the backend."""
    rendezvous_handler_registry.register(BACKEND, create_handler)
    return BACKEND


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Build c10d's handler, which goes on without the store once the ranks run.

    The first machine holds the store and leaves as soon as its ranks have left. torch's agent on another machine asks
    the store ten times a second whether machines wait to join: where its own ranks leave a moment later, the missing
    answer ended it with a traceback and code 1 (torch 2.14.1). Without a store no machine can join.

    Args:
        params: the rendezvous's endpoint and options; `read_timeout` is by default 300 s for the start and 60 s later.

    Returns:
        c10d's handler under the name of `BACKEND`.

    Raises:
        RendezvousConnectionError: if nobody hosts the store in time.
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
