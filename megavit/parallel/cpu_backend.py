"""Run Megatron-Core on the CPU: an import hook replaces `torch.cuda` by `torch.cpu` in the modules that megavit uses.

Megatron-Core 0.16.1 names `torch.cuda` in hundreds of places and supports no other device. The hook rewrites the syntax
tree of an explicit list of its modules while they are imported, and only when the run is on the CPU: nothing in torch
is patched, and on a GPU the modules are imported unchanged.
"""

import ast
import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from types import CodeType, ModuleType
from typing import Any

from megavit.errors import ConfigError

_CORE = "megatron.core."

# Rewrites per module of Megatron-Core 0.16.1. Another count means another version, which a person must check.
_EXPECTED_REWRITES = {
    "jit": 1,
    "parallel_state": 5,
    "timers": 3,
    "utils": 3,
    "tensor_parallel.data": 3,
    "tensor_parallel.layers": 14,
    "tensor_parallel.mappings": 5,
    "tensor_parallel.utils": 2,
    "pipeline_parallel.p2p_communication": 8,
    "pipeline_parallel.schedules": 4,
    "distributed.distributed_data_parallel": 5,
    "distributed.param_and_grad_buffer": 7,
    "optimizer.clip_grads": 6,
    "optimizer.distrib_optimizer": 8,
    "optimizer.grad_scaler": 6,
    "optimizer.optimizer": 11,
    "dist_checkpointing.exchange_utils": 7,
    "dist_checkpointing.strategies.async_utils": 5,
    "dist_checkpointing.strategies.filesystem_async": 1,
    "dist_checkpointing.strategies.fully_parallel": 2,
    "dist_checkpointing.strategies.state_dict_saver": 2,
}

# In `utils` only these are rewritten: the rest of the module queries `torch.cuda` about real devices.
_ONLY_THESE = {
    "utils": {"GlobalMemoryBuffer", "local_multi_tensor_l2_norm", "check_param_hashes_across_dp_replicas"},
}


@cache
def run_on_cpu() -> bool:
    """Return whether this process computes on the CPU: because of `MEGAVIT_DEVICE=cpu`, or without a CUDA device."""
    wanted = os.environ.get("MEGAVIT_DEVICE", "").lower()
    if wanted == "cpu":
        return True
    import torch

    there = torch.cuda.is_available()
    if wanted not in ("", "cuda") or (wanted == "cuda" and not there):
        raise ConfigError(
            f"MEGAVIT_DEVICE={wanted} in the environment: {'there is no CUDA device' if wanted == 'cuda' else 'known'}"
            f"{'' if wanted == 'cuda' else ': cpu, cuda'}; unset it to use CUDA if there is a device"
        )
    return not there


class _Retarget(ast.NodeTransformer):
    """Replace `.cuda`, `'cuda'` and `'torch.cuda.FloatTensor'` by their CPU forms, and disable compiled fusions."""

    def __init__(self) -> None:
        self.rewrites = 0

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda":
            node.attr = "cpu"
            self.rewrites += 1
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        # When it is imported, `jit` decorates small functions that megavit does not use with torch.compile, which
        # imports the compiler: 1.4 s per process (0.16.1).
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "enable_jit_fuser":
            node.func.id = "disable_jit_fuser"
            self.rewrites += 1
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if value == "cuda":
            node.value = "cpu"
            self.rewrites += 1
        elif isinstance(value, str) and value.startswith("torch.cuda.") and value.rstrip(". ,").endswith("Tensor"):
            node.value = value.replace("torch.cuda.", "torch.")
            self.rewrites += 1
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Compile in every process: Python's bytecode cache must not hold rewritten code, which a GPU run would use.
        path = self.get_filename(fullname)
        module: ast.Module = ast.parse(self.get_data(path), path)
        name = fullname.removeprefix(_CORE)
        retarget = _Retarget()
        only = _ONLY_THESE.get(name)
        module.body = [
            retarget.visit(node) if only is None or getattr(node, "name", None) in only else node
            for node in module.body
        ]
        expected = _EXPECTED_REWRITES[name]
        if retarget.rewrites != expected:
            raise ImportError(
                f"{fullname}: {retarget.rewrites} places name CUDA, and megavit expects {expected}. megavit's CPU "
                f"support was written for megatron-core 0.16.1: pip install megatron-core==0.16.1"
            )
        return compile(module, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_CORE) or fullname.removeprefix(_CORE) not in _EXPECTED_REWRITES:
            return None
        if not run_on_cpu():
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install_import_hook() -> None:
    """Retarget the modules of Megatron-Core that are imported later; without effect on a GPU."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def finish_retarget() -> None:
    """Replace the random generator tracker of a retargeted Megatron-Core by one for the CPU.

    Raises:
        RuntimeError: if Megatron-Core was imported before megavit, so that the hook came too late.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as mcore_random

    if not isinstance(parallel_state.__loader__, _Loader):
        raise RuntimeError("megatron.core was imported before megavit: import megavit first")
    if isinstance(mcore_random._CUDA_RNG_STATE_TRACKER, mcore_random.CudaRNGStatesTracker):
        return
    mcore_random._CUDA_RNG_STATE_TRACKER = _make_cpu_tracker(mcore_random)
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    mcore_random._get_cuda_rng_state = _get_rng_state
    mcore_random._set_cuda_rng_state = _set_rng_state


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
    import torch

    return torch.get_rng_state()


def _set_rng_state(state: Any, device: Any = None, graph_safe: bool = False) -> None:
    import torch

    torch.set_rng_state(state)


def _make_cpu_tracker(mcore_random: Any) -> Any:
    import torch

    class CpuRngStatesTracker(mcore_random.CudaRNGStatesTracker):
        """Megatron-Core's named generator states, for the CPU's generator."""

        def add(self, name: str, seed: int) -> None:
            assert name not in self.states_, f"generator state {name} exists"
            self._is_initialized = True
            self.states_[name] = torch.Generator("cpu").manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer_name = self._current_state_name  # type: ignore[has-type]
            outer_state = torch.get_rng_state()
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state if outer_name == "default-rng" else self.states_[outer_name])
                self._current_state_name = outer_name

    return CpuRngStatesTracker()
