"""Test the doctor's findings on GPUs, with a torch that imitates one with GPUs."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megavit.cli.doctor import devices
from megavit.cli.doctor.finding import Finding, State


def one_gpu(*, name: str = "NVIDIA H100", major: int = 9, fails: bool = False) -> Finding:
    def ones(*shape, device):
        if fails:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return torch.ones(*shape)

    cuda = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(name=name, major=major, minor=0),
        mem_get_info=lambda index: (70 * 2**30, 80 * 2**30),
        device=lambda index: nullcontext(),
        is_bf16_supported=lambda *, including_emulation: major >= 8,
    )
    return devices._gpu(SimpleNamespace(cuda=cuda, ones=ones), 0)


def test_a_gpu_is_reported_with_its_memory_and_formats():
    found = one_gpu()
    assert (found.name, found.state) == ("GPU 0", State.ok)
    assert found.text == "NVIDIA H100, 80.0 GiB (70.0 GiB free), compute capability 9.0, bf16"
    assert "NCCL does not connect two instances of one GPU" in one_gpu(name="NVIDIA H100 MIG 1g.10gb").text


def test_a_gpu_without_bf16_is_reported_with_the_setting_and_one_that_does_not_compute_is_broken():
    old = one_gpu(name="Tesla V100", major=7)
    assert old.state is State.missing
    assert old.text.endswith("no bf16")
    assert "train.precision=fp32" in old.advice
    broken = one_gpu(fails=True)
    assert broken.state is State.broken
    assert "no kernel image is available" in broken.text


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "state", "output"),
    [
        (None, "13.2", None, State.ok, "this machine has no NVIDIA driver"),
        ("580.1", None, None, State.missing, "was built without CUDA"),
        ("580.1", "13.2", "", State.missing, "CUDA_VISIBLE_DEVICES hides every GPU"),
        ("470.1", "13.2", "0", State.missing, "torch's CUDA 13.2 does not start with the driver 470.1"),
    ],
)
def test_the_reason_for_training_on_the_cpu_is_reported(driver, cuda, visible, state, output, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=cuda), __version__="2.15.0"
    )
    with mock.patch.object(devices, "_ask_driver", return_value=driver):
        found = devices._cpu_chosen(here)
    assert found.state is state
    assert output in found.text
    assert found.figures == {"device": "cpu", "count": 0}
