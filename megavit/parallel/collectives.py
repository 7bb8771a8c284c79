"""One rank looks, all ranks see the same."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megavit.errors import ConfigError

T = TypeVar("T")

# How often the ranks that wait hear that rank 0 is still at work; far below any time limit of a collective.
_WORD_EVERY_S = 20.0


def broadcast_from_rank0(look: Callable[[], T]) -> T:
    """Ask rank 0 and give its answer to every rank; every rank calls this.

    A shared file system may show the nodes different states of one folder: what decides where a run goes on must be
    read once.

    Args:
        look: called on rank 0; its result is pickled.

    Raises:
        ConfigError: on every rank, if rank 0's look raised one.
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
    """Let rank 0 do what may take longer than a collective may wait (`run.timeout_s`); every rank calls this.

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
    """Raise on every rank what any of them has found; every rank calls this.

    Args:
        value: this rank's message, None if all is well here.

    Raises:
        ConfigError: the first rank's message.
    """
    first = next((message for message in gather_objects(value) if message is not None), None)
    if first is not None:
        raise ConfigError(first)


def gather_objects(value: T) -> list[T]:
    """What every rank has, by rank; every rank calls this.

    Args:
        value: this rank's; pickled.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def broadcast_from(rank: int, tensor: Tensor) -> Tensor:
    """Give one rank's tensor to every rank, on the CPU; every rank calls this.

    Args:
        rank: global rank whose tensor it is.
        tensor: there the tensor, elsewhere one of the same shape and type.
    """
    shared = tensor.cpu().contiguous()
    dist.broadcast(shared, src=rank)
    return shared
