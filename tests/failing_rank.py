"""A rank of a world in which rank 1 fails while the others wait for it in a collective; run by test_launch."""

import os
import sys

import torch

from megavit.errors import ConfigError
from megavit.outcome import run_as_rank
from megavit.parallel.layout import join_world


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


if __name__ == "__main__":
    code = run_as_rank(work, run_dir=lambda: None)
    sys.stderr.flush()
    os._exit(code)
