"""Run a rank of a group in which rank 1 fails in a collective, or every rank rejects its settings at another time."""

import os
import sys
import time

import torch

from megavit.errors import ConfigError
from megavit.parallel.layout import join_world
from megavit.runtime import exit_handler as outcome


def work() -> int:
    join_world(torch.device("cpu"), timeout_s=60)
    rank = torch.distributed.get_rank()
    if rank == 1:
        match sys.argv[1]:
            case "config":
                raise ConfigError("data.path of rank 1 is bad")
            case "fault":
                raise RuntimeError("rank 1 is broken")
            case "killed":
                os.kill(os.getpid(), 9)
    torch.distributed.barrier()
    return 0


def check() -> None:
    """`late N`: reject the settings on every rank, on rank N three seconds later, longer than any later phase waits."""
    if sys.argv[1] == "late":
        outcome._WAIT_S = outcome._LAST_S = 0.5
        time.sleep(3 * (os.environ["RANK"] == sys.argv[2]))
        raise ConfigError("a setting is wrong")


if __name__ == "__main__":
    code = outcome.run_rank(work, check=check, run_dir=lambda: None)
    sys.stderr.flush()
    os._exit(code)
