"""Work of one rank while the others wait."""

import time
from datetime import timedelta

import pytest

from megavit.errors import ConfigError
from megavit.parallel import collectives as agree
from tests.distributed import run_ranks

LIMIT_S = 2.5


def work_long(fails: bool) -> tuple[list[int], str]:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_S))
    done: list[int] = []

    def work() -> None:
        if fails:
            raise ConfigError("no room")
        time.sleep(1.5 * LIMIT_S)
        done.append(dist.get_rank())

    full, agree._WORD_EVERY_S = agree._WORD_EVERY_S, LIMIT_S / 10
    try:
        agree.wait_for_rank_zero(work)
    except ConfigError as error:
        return done, str(error)
    finally:
        agree._WORD_EVERY_S = full
    return done, ""


@pytest.mark.parametrize("fails", [False, True])
def test_rank_zero_may_work_longer_than_a_collective_may_wait(fails):
    output = "no room" if fails else ""
    assert run_ranks(work_long, 2, fails) == [([] if fails else [0], output), ([], output)]
