"""Test that a broken checkpoint is never loaded: a flipped byte is found, its file named, an older checkpoint used."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.manifest import FILE, find_fault, find_faults
from megavit.checkpoint.state import read_state
from megavit.errors import ConfigError
from tests import ranks
from tests.cli.test_mistakes import main_here
from tests.distributed import run_ranks
from tests.reference import SMALL

RUN = [*SMALL, "train.steps=3", "checkpoint.save_every=1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Train a run with three checkpoints."""
    run_dir = tmp_path_factory.mktemp("saved")
    run_ranks(ranks.train_and_keep, 2, [*RUN, "parallel.pp=2", f"run.dir={run_dir}"])
    return run_dir


@pytest.fixture
def checkpoint(saved, tmp_path):
    return Path(shutil.copytree(saved / "checkpoints" / "step_00000003", tmp_path / "step_00000003"))


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_complete_checkpoint_is_valid_and_every_file_is_in_its_manifest(checkpoint):
    assert find_fault(checkpoint) is None
    names = {path.name for path in files(checkpoint)}
    assert set(json.loads((checkpoint / FILE).read_text())["files"]) == names - {FILE}
    assert names >= {
        ".metadata",
        "common.pt",
        "metadata.json",
        "run.yaml",
        "state.json",
        "__0_0.distcp",
        "__1_0.distcp",
    }


def test_one_flipped_byte_at_two_hundred_places_is_found_and_its_file_named(checkpoint):
    draw = random.Random(0)
    places = files(checkpoint)
    for _ in range(200):
        path = draw.choice(places)
        full = path.read_bytes()
        place = draw.randrange(len(full))
        flipped = bytearray(full)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        fault = find_fault(checkpoint)
        assert fault is not None, f"byte {place} of {path.name}"
        assert fault.file == path
        path.write_bytes(full)
    assert find_fault(checkpoint) is None


def test_truncated_empty_missing_and_unlisted_files_are_found_and_named(checkpoint):
    draw = random.Random(1)
    for path in [*files(checkpoint), *draw.choices(files(checkpoint), k=20)]:
        full = path.read_bytes()
        for content in (full[: draw.randrange(len(full))], b"", None):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            fault = find_fault(checkpoint)
            assert fault is not None, path.name
            # Without the file that Megatron-Core writes last, no other file is checked.
            assert fault.file == path or (path.name == "metadata.json" and content is not None)
            path.write_bytes(full)
    (checkpoint / "extra").write_text("from elsewhere")
    assert [str(fault) for fault in find_faults(checkpoint)] == [f"{checkpoint}/extra is not in the manifest"]


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"schema_version": 3}', '{"schema_version": "x"}', '{"step": 1}']
)
def test_a_broken_state_is_named(content, checkpoint):
    (checkpoint / "state.json").write_text(content)
    assert find_fault(checkpoint).file.name == "state.json"
    with pytest.raises(ConfigError, match=r"state\.json is broken"):
        read_state(checkpoint)


@pytest.mark.parametrize("version", [2, 99])
def test_another_schema_version_is_refused(version, checkpoint):
    path = checkpoint / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    with pytest.raises(ConfigError, match=f"has schema version {version} and this megavit reads version 3"):
        read_state(checkpoint)


def test_a_state_with_a_removed_field_is_read(checkpoint):
    path, before = checkpoint / "state.json", read_state(checkpoint)
    path.write_text(json.dumps({**json.loads(path.read_text()), "former_order": False}))
    assert read_state(checkpoint) == before


def test_a_missing_manifest_is_a_fault(checkpoint):
    (checkpoint / FILE).unlink()
    assert str(find_fault(checkpoint)) == f"{checkpoint}/{FILE} is missing"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_resumed_run_falls_back_to_the_newest_valid_one_and_warns_once(saved, tmp_path):
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    flip(run_dir / "checkpoints" / "step_00000003" / "__1_0.distcp")
    (run_dir / "checkpoints" / "latest").write_text("ste")
    (run_dir / "train.log").unlink()
    longer = [*RUN, "parallel.pp=2", "train.steps=5", "optim.schedule=constant"]
    got = run_ranks(ranks.train_and_keep, 2, [*longer, f"run.dir={run_dir}"])[0]
    assert sorted(got["losses"]) == [1, 2, 3, 4, 5]
    log = (run_dir / "train.log").read_text()
    assert (
        log.count("step_00000003/__1_0.distcp has changed since it was written (sha256); step_00000003 is ignored") == 1
    )
    assert log.count("latest is broken (it holds 'ste')") == 1
    assert "resumes from " in log
    assert "step_00000002 at step 2 of 5" in log
    # After a new save the checkpoint is valid, and so are the older ones.
    assert all(find_fault(path) is None for path in CheckpointManager(run_dir / "checkpoints").all())


def test_without_a_valid_checkpoint_nothing_starts_and_nothing_is_deleted(saved, tmp_path):
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    for path in CheckpointManager(run_dir / "checkpoints").all():
        (path / "run.yaml").write_text("")
    code, output = run_ranks(main_here, 1, ["train", *RUN, f"run.dir={run_dir}"])[0]
    assert code == 2
    assert "no checkpoint in" in output
    assert output.count("run.yaml has 0 bytes") == 3
    assert len(CheckpointManager(run_dir / "checkpoints").all()) == 3


def test_a_broken_checkpoint_is_not_loaded_by_name_either(saved, tmp_path):
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    broken = run_dir / "checkpoints" / "step_00000003"
    flip(broken / ".metadata")
    for arguments in (
        ["train", *RUN, f"run.dir={tmp_path / 'new'}", f"checkpoint.resume={broken}"],
        ["evaluate", f"from={broken}"],
        ["inspect", f"from={broken}"],
    ):
        code, output = run_ranks(main_here, 1, arguments)[0]
        assert code == 2
        assert "step_00000003/.metadata has changed since it was written" in output
        assert output.count("megavit: ") == 1
    # For the run, the newest valid checkpoint is taken.
    code, output = run_ranks(main_here, 1, ["inspect", f"from={run_dir}"])[0]
    assert code == 0
    assert output.count("warning: ") == 1


def test_verify_says_of_each_checkpoint_what_is_broken(saved, tmp_path):
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    assert run_ranks(main_here, 1, ["verify", f"from={run_dir}"])[0][0] == 0
    flip(run_dir / "checkpoints" / "step_00000002" / "common.pt")
    assert run_ranks(main_here, 1, ["verify", f"from={run_dir}"])[0][0] == 3
    assert run_ranks(main_here, 1, ["verify", f"from={run_dir / 'checkpoints' / 'step_00000001'}"])[0][0] == 0
    code, output = run_ranks(main_here, 1, ["verify", f"from={tmp_path}"])[0]
    assert code == 2
    assert "holds no checkpoint" in output


def test_prune_keeps_the_newest_the_best_those_spared_and_the_last_valid_one(saved, tmp_path):
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    store = CheckpointManager(run_dir / "checkpoints")

    def steps() -> list[int]:
        return sorted(int(path.name[-8:]) for path in store.all())

    assert store.prune(keep_last=None, keep_every=None) == []
    assert [path.name for path in store.prune(keep_last=1, keep_every=2)] == ["step_00000001"]
    assert steps() == [2, 3]
    flip(run_dir / "checkpoints" / "step_00000003" / "common.pt")
    code, output = run_ranks(main_here, 1, ["prune", f"from={run_dir}", "keep_last=1"])[0]
    assert (code, output) == (0, "")
    # The newest is broken, so the one before is the last valid one.
    assert steps() == [2, 3]
    for wrong in (["keep_last=0"], ["keep_last=some"], []):
        assert run_ranks(main_here, 1, ["prune", f"from={run_dir}", *wrong])[0][0] == 2


def test_a_run_keeps_as_many_as_keep_last(tmp_path):
    keys = [*SMALL, "train.steps=9", "checkpoint.save_every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4"]
    run_ranks(ranks.train_and_keep, 1, [*keys, f"run.dir={tmp_path}"])
    assert sorted(path.name[-8:] for path in CheckpointManager(tmp_path / "checkpoints").all()) == [
        "00000004",
        "00000008",
        "00000009",
    ]
    assert not list((tmp_path / "checkpoints").glob(".step_*"))


def test_only_a_new_start_of_the_run_cleans_up_after_a_killed_one(saved, tmp_path):
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    folder = run_dir / "checkpoints"
    # This checkpoint was moved aside for another one of its step, which was not completed.
    (folder / "step_00000003").rename(folder / ".step_00000003.old")
    shutil.copytree(folder / "step_00000001", folder / ".step_00000004.tmp")
    shutil.copytree(folder / "step_00000001", folder / ".step_00000000.gone")
    store = CheckpointManager(folder)
    assert store.latest_valid() == (folder / "step_00000002", [])
    assert len(list(folder.glob(".step_*"))) == 3
    store.remove_partial()
    assert store.latest_valid() == (folder / "step_00000003", [])
    assert not list(folder.glob(".step_*"))
