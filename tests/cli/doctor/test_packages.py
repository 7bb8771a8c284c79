"""Test the doctor's findings on packages, from their metadata and from importing them in a subprocess."""

import pytest

from megavit.cli.doctor import versions
from megavit.cli.doctor.finding import State
from megavit.cli.doctor.isolated import CHECKS, run_in_subprocess
from megavit.cli.doctor.versions import check_versions
from tests.cli.doctor.machines import only, pretend


def test_what_is_installed_here_is_good():
    findings = check_versions()
    assert {finding.state for finding in findings if finding.name != "wandb"} == {State.ok}
    assert only(findings, "megatron-core").text == "0.16.1"
    assert only(findings, "other packages").figures.keys() >= {"numpy", "timm", "rich"}


def test_another_megatron_core_is_broken_and_both_versions_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(pretend(tmp_path, "megatron-core", "0.15.2"))
    found = only(check_versions(), "megatron-core")
    assert found.state is State.broken
    assert found.text == "0.15.2 is installed, and megavit needs ==0.16.1"
    assert found.advice == "pip install 'megatron-core==0.16.1'"


def test_a_required_package_that_is_absent_is_broken(monkeypatch):
    found = versions.version

    def without_timm(name):
        if name == "timm":
            raise versions.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(versions, "version", without_timm)
    findings = check_versions()
    assert only(findings, "timm").state is State.broken
    assert only(findings, "timm").advice == "pip install 'timm>=1.0.31'"
    assert "timm" not in only(findings, "other packages").figures


def test_an_older_python_is_broken(monkeypatch):
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.4")
    found = only(check_versions(), "python")
    assert (found.state, found.text) == (State.broken, "3.10.4, and megavit needs >=3.11")


def test_without_metadata_of_megavit_nothing_is_called_good_or_broken(monkeypatch):
    def nothing(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", nothing)
    found = only(check_versions(), "megavit")
    assert found.state is State.missing
    assert "no version was compared" in found.text


PYRAMID = {"apex/__init__.py": "", "apex/views.py": ""}
WITHOUT_CUDA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass\n"}


@pytest.mark.parametrize(
    ("files", "output"),
    [
        (PYRAMID, "another project with this name, not NVIDIA's"),
        (WITHOUT_CUDA, "NVIDIA's, without its CUDA extensions (amp_C)"),
        ({**WITHOUT_CUDA, "amp_C.py": ""}, "is imported and not called: it runs only on CUDA"),
        ({"apex/__init__.py": "import pyramid_of_nobody"}, "No module named 'pyramid_of_nobody'"),
    ],
)
def test_apex_on_pypi_is_distinguished_from_nvidias(files, output, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pretend(tmp_path, "apex", "0.9.10", files)), prepend=":")
    monkeypatch.setenv("MEGAVIT_DEVICE", "cpu")
    (found,) = run_in_subprocess(["apex"])
    assert found.state is State.missing
    assert "0.9.10" in found.text
    assert output in found.text
    assert "apex on PyPI is another project" in found.advice


def test_a_package_that_crashes_or_hangs_in_its_import_is_reported_and_the_others_are_checked(tmp_path, monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    folder = pretend(tmp_path, "flash-attn", "2.8.0", {"flash_attn/__init__.py": crash})
    pretend(tmp_path, "apex", "0.1", {"apex/__init__.py": "import time; print('noise'); time.sleep(60)"})
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.setenv("MEGAVIT_DEVICE", "cpu")
    findings = list(run_in_subprocess(["flash-attn", "apex", "processor"], patience_s=5))
    assert only(findings, "flash-attn").text.startswith("its process ended by SIGSEGV")
    assert only(findings, "apex").text == "no answer in 5 s: its process was killed"
    assert {only(findings, name).state for name in ("flash-attn", "apex")} == {State.missing}
    assert only(findings, "processor").figures["threads"] >= 1


def test_every_kernel_of_torch_is_reported_and_sdpa_runs(monkeypatch):
    monkeypatch.setenv("MEGAVIT_DEVICE", "cpu")
    findings = list(run_in_subprocess(["torch", "attention"]))
    names = [finding.name for finding in findings]
    assert names == [
        "torch", "sdpa", "sdpa_flash", "flash_attn", "te",
        "torch's math", "torch's flash", "torch's efficient", "torch's cudnn",
    ]  # fmt: skip
    assert only(findings, "sdpa").state is State.ok
    assert only(findings, "sdpa").figures.keys() == {"fp32", "bf16"}
    assert only(findings, "torch's math").text == "ran in fp32 and bf16"
    # torch has no such kernels for CPUs.
    assert "does not run in fp32 and bf16" in only(findings, "torch's cudnn").text
    assert "only on CUDA" in only(findings, "sdpa_flash").text


def test_a_torch_that_cannot_be_imported_breaks_each_check_that_needs_it(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cuda.so: undefined symbol')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    findings = list(run_in_subprocess(list(CHECKS)))
    for name in ("torch", "megavit.train.trainer", "training on", "attention"):
        assert only(findings, name).state is State.broken
        assert "libtorch_cuda.so: undefined symbol" in only(findings, name).text
    assert only(findings, "processor").state is State.ok
