"""Broadcast and gather Python objects; raise an error on all ranks if one rank has it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megavit.errors import ConfigError

T = TypeVar("T")

# How often rank 0 reports to the waiting ranks that it still works; far below any time limit of a collective.
_WORD_EVERY_S = 20.0


def broadcast_from_rank0(look: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank; every rank calls this.

    A shared file system may show the nodes different states of one folder, so a decision that depends on files must be
    made by one rank.

    Args:
        look: called on rank 0; its result is pickled.

    Raises:
        ConfigError: on every rank, if the function raised one on rank 0.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = look()
        except ConfigError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ConfigError(answer[1])
    return answer[0]


def wait_for_rank_zero(work: Callable[[], None]) -> None:
    """Run work on rank 0 that may take longer than a collective may wait (`run.timeout_s`); every rank calls this.

    Args:
        work: called on rank 0.

    Raises:
        ConfigError: on every rank, if rank 0's work raised one.
    """
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work) if dist.get_rank() == 0 else None
        while not broadcast_from_rank0(lambda: doing is not None and _is_done(doing)):
            pass


def _is_done(doing: Future[None]) -> bool:
    wait([doing], timeout=_WORD_EVERY_S)
    if not doing.done():
        return False
    doing.result()
    return True


def raise_on_all_ranks(value: str | None) -> None:
    """Raise an error on every rank if any rank has a message; every rank calls this.

    Args:
        value: this rank's message; None for no error.

    Raises:
        ConfigError: with the message of the lowest rank that has one.
    """
    first = next((message for message in gather_objects(value) if message is not None), None)
    if first is not None:
        raise ConfigError(first)


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, by rank; every rank calls this.

    Args:
        value: this rank's value; it is pickled.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def broadcast_from(rank: int, tensor: Tensor) -> Tensor:
    """Broadcast one rank's tensor to every rank, on the CPU; every rank calls this.

    Args:
        rank: global rank that has the tensor.
        tensor: the tensor on that rank; on the others one of the same shape and type.
    """
    shared = tensor.cpu().contiguous()
    dist.broadcast(shared, src=rank)
    return shared
