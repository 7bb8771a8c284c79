"""The commands of docs/configuration.md run in an empty folder: in this environment, and from an installed wheel."""

import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from megavit.cli.main import run
from tests.test_readme import ROOT, blocks, commands, shell

FILES = {
    "conf/model/my_vit.yaml": "defaults: [vit_digits, _self_]\nnum_layers: 2\n",
    "conf/cluster/mine.yaml": "kind: slurm\nnodes: 1\ngpus_per_node: 0\nranks_per_node: 2\n",
    "other_conf/model/my_other_vit.yaml": "defaults: [vit_digits, _self_]\nnum_layers: 1\n",
}


def _prepare(folder: Path) -> list[str]:
    """Write the files that the page names, and return its commands."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    page = "docs/configuration.md"
    return [
        line
        for heading in ("Settings", "Files of your own")
        for block in blocks(page, heading, "bash")
        for line in commands(block)
    ]


def _check_outputs(folder: Path, output: str) -> None:
    names = ("first", "by_path", "several", "repeated", "by_name", "other")
    assert [name for name in names if not (folder / "runs" / name / "checkpoints/latest").exists()] == []
    by_path, repeated = ((folder / "runs" / name / "config.yaml").read_text() for name in ("by_path", "repeated"))
    assert repeated == by_path.replace("by_path", "repeated")
    assert "num_layers: 2" in (folder / "runs/by_name/config.yaml").read_text()
    assert "num_layers: 1" in (folder / "runs/other/config.yaml").read_text()
    assert "choices found in" in output
    assert "model.num_layers=4" in output or "model.hidden_size=64" in output


def test_a_recipe_of_the_users_trains_resumes_evaluates_and_is_submitted(tmp_path, monkeypatch, capsys):
    lines = _prepare(tmp_path)
    chosen = [line for line in lines if "config new" in line or "by_name" in line or "submit" in line]
    chosen.insert(2, chosen[1].replace("run.name=by_name", "run.name=by_name train.steps=25"))
    monkeypatch.chdir(tmp_path)
    output = []
    for line in chosen:
        if line.startswith("megavit train"):
            result = shell(line, tmp_path)
            assert result.returncode == 0, (line, result.stderr[-500:])
            output.append(result.stdout)
        else:
            assert run(shlex.split(line)[1:]) == 0
            output.append(capsys.readouterr().out)
    assert "choices found in" in output[1]
    assert "step 20" in output[2]
    assert "#SBATCH" in output[-1]
    assert "recipe=null" in output[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_page_runs_from_an_installed_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "w", ROOT],
        check=True,
    )
    (wheel,) = (tmp_path / "w").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site = next((tmp_path / "env/lib").glob("python3*")) / "site-packages"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    # The packages of this environment; its own megavit, an editable one, comes after the wheel's.
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    empty = tmp_path / "empty"
    empty.mkdir()
    python = tmp_path / "env/bin/python"
    where = subprocess.run(
        [python, "-c", "import megavit; print(megavit.__file__)"], cwd=empty, text=True, capture_output=True
    )
    assert where.stdout.startswith(str(site)), where
    output = ""
    for line in _prepare(empty):
        words = line.replace("megavit ", f"{python} -m megavit ", 1)
        result = subprocess.run(
            words, shell=True, cwd=empty, capture_output=True, text=True, timeout=280,
            env={**os.environ, "MEGAVIT_DEVICE": "cpu", "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        assert result.returncode == 0, (line, result.stderr[-1000:])
        output += result.stdout
    _check_outputs(empty, output)
