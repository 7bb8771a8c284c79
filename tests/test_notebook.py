"""Notebooks: the documented one runs; a kernel trains as the command line does, and an interrupt saves."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import megavit

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FIRST_STEPS = Path(__file__).parents[1] / "docs" / "notebooks" / "first_steps.ipynb"
SETTINGS = ["optim.lr=1e-3", "train.steps=20", "metrics.log_every=1", "metrics.tensorboard=false"]


def client(notebook, folder: Path):
    return nbclient.NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": folder}}
    )


def notebook_of(*cells: str):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def printed(notebook) -> list[str]:
    return ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_notebook_is_small_and_every_cell_has_run():
    notebook = nbformat.read(FIRST_STEPS, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert FIRST_STEPS.stat().st_size < 100_000


@pytest.mark.slow
def test_the_documented_notebook_runs_and_its_committed_results_are_those_it_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAVIT_DEVICE", "cpu")
    committed, notebook = (nbformat.read(FIRST_STEPS, as_version=4) for _ in range(2))
    client(notebook, tmp_path).execute()
    # The evaluation; only the working directory differs.
    assert printed(notebook)[4].replace(str(tmp_path), "/tmp/first_steps") == printed(committed)[4]
    shown = [out.data for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if "data" in out]
    assert any('<progress value="200" max="200">' in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)


@pytest.mark.slow
def test_a_notebook_trains_as_the_command_line_does_to_the_bit_at_one_and_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAVIT_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    layouts = {"one": [], "two": ["run.ranks=2", "parallel.tp=2"]}
    cells = [
        f"import megavit; megavit.train('digits', *{[*SETTINGS, *layout]!r}, **{{'run.dir': 'notebook_{name}'}})"
        for name, layout in layouts.items()
    ]
    notebook = notebook_of(*cells)
    client(notebook, tmp_path).execute()
    assert "complete: step 20 of 20" in printed(notebook)[1]
    for name, layout in layouts.items():
        run_dir = tmp_path / f"command_{name}"
        command = [sys.executable, "-m", "megavit", "train", "recipe=digits", *SETTINGS, *layout, f"run.dir={run_dir}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        frames = [megavit.Run(folder).metrics for folder in (run_dir, tmp_path / f"notebook_{name}")]
        losses = [frame.query("split == 'train'").loss.tolist() for frame in frames]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 20


@pytest.mark.slow
def test_interrupting_the_kernel_saves_and_the_next_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAVIT_DEVICE", "cpu")
    endless = (
        "import megavit; run = megavit.train('digits', 'train.steps=100000', 'run.dir=run', 'metrics.log_every=1')"
    )
    notebook = notebook_of(
        endless, "print(run.stopped, run.step < 100000, (run.dir / 'checkpoints' / 'latest').exists())"
    )
    running = client(notebook, tmp_path)

    def interrupt() -> None:
        file = tmp_path / "run" / "metrics.jsonl"
        while not (file.exists() and file.stat().st_size):
            time.sleep(0.1)
        os.kill(running.km.provisioner.process.pid, 2)

    threading.Thread(target=interrupt, daemon=True).start()
    running.execute()
    assert printed(notebook)[1] == "True True True\n"
