"""The import hook rewrites the expected places of Megatron-Core on the CPU, and nothing else."""

import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader

import pytest
import torch
from megatron.core import parallel_state, timers

from megavit.parallel import cpu_backend as cpu
from megavit.parallel.layout import choose_device


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_another_count_of_rewrites_is_refused(monkeypatch):
    monkeypatch.setitem(cpu._EXPECTED_REWRITES, "timers", cpu._EXPECTED_REWRITES["timers"] + 1)
    with pytest.raises(ImportError, match="3 places name CUDA, and megavit expects 4"):
        cpu._Loader(timers.__name__, timers.__file__).get_code(timers.__name__)


def test_importing_megatron_first_is_named(monkeypatch):
    monkeypatch.setattr(parallel_state, "__loader__", SourceFileLoader(parallel_state.__name__, ""))
    with pytest.raises(RuntimeError, match="import megavit first"):
        cpu.finish_retarget()


def test_torch_itself_is_not_patched():
    code = """
import torch
before = {name: id(getattr(torch.cuda, name)) for name in dir(torch.cuda)}
import megavit
import megatron.core.parallel_state
from megavit.parallel import cpu_backend as cpu
cpu.finish_retarget()
assert before == {name: id(getattr(torch.cuda, name)) for name in before}
assert isinstance(megatron.core.parallel_state.__loader__, cpu._Loader)
print("good")
"""
    result = run_python(code, MEGAVIT_DEVICE="cpu")
    assert result.stdout.strip() == "good", result.stderr


def test_with_a_gpu_megatron_is_imported_unchanged(monkeypatch):
    monkeypatch.setattr(cpu, "run_on_cpu", lambda: False)
    assert cpu._Finder().find_spec("megatron.core.timers", None) is None


@pytest.mark.parametrize("value", ["cpu", "CPU"])
def test_the_environment_selects_the_cpu(value, monkeypatch):
    monkeypatch.setenv("MEGAVIT_DEVICE", value)
    cpu.run_on_cpu.cache_clear()
    try:
        assert cpu.run_on_cpu()
    finally:
        cpu.run_on_cpu.cache_clear()


def test_a_rank_uses_omp_num_threads_or_its_part_of_the_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        choose_device()
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        choose_device()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)
