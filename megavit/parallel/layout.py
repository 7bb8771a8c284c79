"""Describe the parallel layout: its sizes, this rank's coordinates, its device and process groups."""

import gc
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megavit.errors import ConfigError
from megavit.parallel import cpu_backend as cpu
from megavit.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# torch.distributed and Megatron-Core have one state for each process.
_WORLD = threading.Lock()


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes and this rank's coordinates along tensor (tp), pipeline (pp) and data (dp) parallelism.

    Ranks are numbered tensor-parallel fastest, then data, then pipeline, as in Megatron-Core: the ranks that
    communicate most are on one node.
    """

    tp: int
    pp: int
    vpp: int
    dp: int
    sequence_parallel: bool
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    groups: "ProcessGroupCollection"

    @property
    def holds_first_stage(self) -> bool:
        """Return whether this rank embeds the images."""
        return self.pp_rank == 0

    @property
    def holds_last_stage(self) -> bool:
        """Return whether this rank computes the loss."""
        return self.pp_rank == self.pp - 1

    def is_first_stage(self, virtual_stage: int) -> bool:
        """Return whether one of this rank's stages, counted from 0, is the model's first."""
        return self.holds_first_stage and virtual_stage == 0

    def is_last_stage(self, virtual_stage: int) -> bool:
        """Return whether one of this rank's stages, counted from 0, is the model's last."""
        return self.holds_last_stage and virtual_stage == self.vpp - 1

    @property
    def last_stage_rank(self) -> int:
        """Return the lowest global rank that computes the loss."""
        return self.world_size // self.pp * (self.pp - 1)

    @classmethod
    def alone(cls) -> "ParallelLayout":
        """Return a layout of this process only, on the CPU and without process groups, for commands that read data."""
        return cls(
            tp=1,
            pp=1,
            vpp=1,
            dp=1,
            sequence_parallel=False,
            rank=0,
            world_size=1,
            tp_rank=0,
            pp_rank=0,
            dp_rank=0,
            device=torch.device("cpu"),
            groups=None,  # type: ignore[arg-type]
        )

    def on_one_stage(self) -> "ParallelLayout":
        """Return this rank's layout for a network that is on one pipeline stage, without sequence parallelism."""
        groups = copy(self.groups)
        groups.pp = None
        return replace(self, pp=1, vpp=1, pp_rank=0, sequence_parallel=False, groups=groups)

    def describe(self) -> str:
        """Return the layout in one line for the log."""
        sequence = " + SP" if self.sequence_parallel else ""
        virtual = f" (VPP {self.vpp})" if self.vpp > 1 else ""
        sizes = f"TP {self.tp}{sequence} × PP {self.pp}{virtual} × DP {self.dp}"
        return f"{self.world_size} {'rank' if self.world_size == 1 else 'ranks'} = {sizes} on {self.device.type}"

    @classmethod
    def create(cls, config: ParallelConfig, *, timeout_s: float) -> "ParallelLayout":
        """Join the process group (of one rank without a launcher) and create the parallel groups.

        Args:
            config: the parallel group, checked against the world size.
            timeout_s: seconds after which a collective that waits for a lost rank fails.
        """
        device = choose_device()
        if not dist.is_initialized():
            join_world(device, timeout_s=timeout_s)
        if device.type == "cpu":
            cpu.finish_retarget()
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection

        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            config.tp,
            config.pp,
            config.vpp if config.vpp > 1 else None,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
        return cls(
            tp=config.tp,
            pp=config.pp,
            vpp=config.vpp,
            dp=parallel_state.get_data_parallel_world_size(),
            sequence_parallel=config.sequence_parallel,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            device=device,
            groups=ProcessGroupCollection.use_mpu_process_groups(),
        )


@contextmanager
def temporary_world() -> Iterator[None]:
    """Leave, after the body, the process group and the parallel groups that the body has created.

    Raises:
        ConfigError: if another body is under way in this process, such as the run of whose callback this is a call.
    """
    if not _WORLD.acquire(blocking=False):
        raise ConfigError("a run, or another use of a network, is under way in this process; call this when it ends")
    was_initialized = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not was_initialized:
            leave_world()
        _WORLD.release()


def leave_world() -> None:
    """Destroy the parallel groups and the process group of this process, with the networks that were trained in it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as mcore_random

    from megavit.parallel.ddp import GradientBuffers

    # Megatron-Core's wrapper stays alive through hooks that the garbage collector cannot see, and with it the weights,
    # every process group and gloo's threads (0.16.1). Nobody uses it any more, so it is emptied by hand.
    # By type, not isinstance: that looks into weak proxies, of which torch.compile leaves dead ones.
    for wrapper in [thing for thing in gc.get_objects() if issubclass(type(thing), GradientBuffers)]:
        wrapper.__dict__.clear()
    gc.collect()
    mcore_random.get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def world_size_from_environment() -> int:
    """Return the number of ranks that the launcher (torchrun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """Return this process's global rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def choose_device() -> torch.device:
    """Return this rank's device: its GPU, or the CPU with OMP_NUM_THREADS threads (by default its part of the cores).

    Raises:
        ConfigError: if there are more ranks than GPUs.
    """
    if cpu.run_on_cpu():
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # torch has read OMP_NUM_THREADS. Schedulers that limit the number of cores without binding them set it.
        if not os.environ.get("OMP_NUM_THREADS"):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // local_ranks))
        return torch.device("cpu")
    local_ranks, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local_ranks > devices:
        raise ConfigError(
            f"{local_ranks} ranks on this machine and {devices} CUDA devices: each rank needs its own; start at most "
            f"{devices} (run.ranks), or set MEGAVIT_DEVICE=cpu in the environment"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def join_world(device: torch.device, *, timeout_s: float) -> None:
    """Initialise torch.distributed for this device, from the launcher's environment variables."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if world_size_from_environment() == 1 and "RANK" not in os.environ:
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(backend, timeout=timeout)
