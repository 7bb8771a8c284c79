from pathlib import Path

import pytest

from megavit.runtime.torchrun import cluster_exit_code


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAVIT_MAX_RESTARTS", "2")
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def cluster_code(code: int, run_dir: Path, node: str = "0") -> int:
    return cluster_exit_code(code, run_dir, node=node)


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (2, 2), (75, 203), (1, 129)])
def test_only_the_code_of_a_run_to_restart_is_above_127(code, seen, run_dir):
    assert cluster_code(code, run_dir) == seen


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_without_the_variable_codes_stay_as_they_are(code, run_dir, monkeypatch):
    monkeypatch.delenv("MEGAVIT_MAX_RESTARTS")
    assert cluster_code(code, run_dir) == code
    assert not (run_dir / "launch").exists()


def test_after_max_restarts_crashes_in_a_row_the_run_is_not_restarted_and_a_new_job_counts_from_zero(run_dir, capsys):
    assert [cluster_code(1, run_dir) for _ in range(4)] == [129, 129, 1, 129]
    assert "crashed 3 times in a row (cluster.max_restarts=2): not restarted" in capsys.readouterr().err


def test_a_new_checkpoint_begins_a_new_count(run_dir):
    seen = []
    for step in (1, 1, 2, 2, 2):
        (run_dir / "checkpoints" / "latest").write_text(f"step_{step}\n")
        seen.append(cluster_code(1, run_dir))
    assert seen == [129, 129, 129, 129, 1]


def test_a_stop_is_no_crash(run_dir):
    assert [cluster_code(code, run_dir) for code in (1, 1, 75, 1, 1, 1)] == [129, 129, 203, 129, 129, 1]


def test_each_node_counts_for_itself(run_dir):
    assert [cluster_code(1, run_dir, node) for node in "001101"] == [129, 129, 129, 129, 1, 1]


def test_a_crash_that_cannot_be_counted_is_not_restarted(run_dir, capsys):
    (run_dir / "launch").write_text("no folder")
    assert cluster_code(1, run_dir) == 1
    assert "not restarted, because crashes cannot be counted" in capsys.readouterr().err


def test_a_job_without_restarts_ends_at_its_first_crash(run_dir, monkeypatch):
    monkeypatch.setenv("MEGAVIT_MAX_RESTARTS", "0")
    assert cluster_code(1, run_dir) == 1
