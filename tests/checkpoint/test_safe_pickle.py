"""Test that loading an untrusted checkpoint with a correct manifest runs no code from it."""

import builtins
import functools
import io
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megavit.checkpoint.manifest import FILE, describe, find_fault, write_manifest
from megavit.checkpoint.safe_pickle import check_pickles
from megavit.errors import ConfigError
from tests import ranks
from tests.cli.test_mistakes import main_here
from tests.distributed import run_ranks
from tests.reference import SMALL

PROOF = "a_stranger_was_here"


class Calls:
    """An object that is pickled as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Raw:
    """An object that is pickled as the name `module.name`."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def dumps(self) -> bytes:
        parts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (self.module, self.name))
        argument = b"\x8c" + bytes([len(PROOF)]) + PROOF.encode()
        return b"\x80\x04" + parts + b"\x93" + argument + b"\x85R."


def touch() -> Calls:
    return Calls(open, PROOF, "w")


METADATA = {
    "os.system": (pickle.dumps(Calls(os.system, f"touch {PROOF}")), "posix.system"),
    "builtins.eval": (pickle.dumps(Calls(builtins.eval, f"open('{PROOF}', 'w')")), "builtins.eval"),
    "open": (pickle.dumps(touch()), "io.open"),
    "a partial in a partial": (
        pickle.dumps(Calls(functools.partial(functools.partial, os.mkdir), PROOF)),
        "functools.partial",
    ),
    "deep within an allowed class": (
        pickle.dumps(Metadata(state_dict_metadata={"a": OrderedDict(b=[touch()])})),
        "io.open",
    ),
    "in an allowed class's place": (pickle.dumps(Calls(torch.Size, Calls(os.mkdir, PROOF))), "posix.mkdir"),
    "by way of an allowed module": (
        Raw("torch.distributed.checkpoint.metadata", "os.mkdir").dumps(),
        "metadata.os.mkdir",
    ),
    "by way of torch": (Raw("torch", "os.mkdir").dumps(), "torch.os.mkdir"),
    "torch.load": (Raw("torch", "load").dumps(), "torch.load"),
    "getattr": (pickle.dumps(Calls(getattr, "torch", "upper")), "builtins.getattr"),
    "getattr of an allowed class": (pickle.dumps(Calls(getattr, Metadata, "__init__")), "builtins.getattr"),
    "getattr of an enum": (pickle.dumps(Calls(getattr, WriteItemType, "mro")), "builtins.getattr"),
    "getattr of an enum's member": (pickle.dumps(Calls(getattr, WriteItemType.TENSOR, "name")), "builtins.getattr"),
    "no pickle": (b"not a pickle", "is rejected"),
    "another object": (pickle.dumps({"state_dict_metadata": {}}), "has no attribute"),
    "a reference outside": (b"\x80\x04Pabc\n.", "outside"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved")
    run_ranks(ranks.train_and_keep, 1, [*SMALL, "train.steps=2", "optim.warmup_steps=1", f"run.dir={run_dir}"])
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, tmp_path / "run"))


def tamper(run_dir: Path, name: str, content: bytes) -> Path:
    """Replace a file of the checkpoint, and correct the manifest."""
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, describe(checkpoint, [p.name for p in checkpoint.iterdir() if p.name != FILE]))
    assert find_fault(checkpoint) is None
    return checkpoint


def assert_nothing_ran(run_dir: Path) -> None:
    assert not (run_dir.parent / PROOF).exists()
    assert not Path(PROOF).exists()


def test_an_ordinary_checkpoint_is_let_through(run_dir):
    check_pickles(run_dir / "checkpoints" / "step_00000002")


def test_a_checkpoint_that_python_3_11_2_wrote_is_let_through(run_dir, monkeypatch):
    def reduce(member, protocol):
        return getattr, (type(member), member.name)

    # Up to 3.11.3 an enum's member is pickled as getattr of its class.
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduce)
    metadata = pickle.loads((run_dir / "checkpoints" / "step_00000002" / ".metadata").read_bytes())
    written = pickle.dumps(metadata)
    assert b"getattr" in written
    check_pickles(tamper(run_dir, ".metadata", written))


@pytest.mark.parametrize("attack", METADATA)
def test_metadata_that_names_what_is_not_allowed_is_refused_by_that_name(attack, run_dir):
    content, named = METADATA[attack]
    checkpoint = tamper(run_dir, ".metadata", content)
    with pytest.raises(ConfigError, match=r"\.metadata is rejected: ") as refused:
        check_pickles(checkpoint)
    assert named in str(refused.value)
    assert_nothing_ran(run_dir)


def test_the_attacks_would_have_worked(run_dir):
    for attack in ("os.system", "builtins.eval", "open", "deep within an allowed class"):
        pickle.loads(METADATA[attack][0])
        assert Path(PROOF).exists(), attack
        Path(PROOF).unlink()


def test_a_weight_that_is_declared_an_object_is_refused(run_dir):
    metadata = pickle.loads((run_dir / "checkpoints" / "step_00000002" / ".metadata").read_bytes())
    metadata.state_dict_metadata["head.out.weight"] = BytesStorageMetadata()
    checkpoint = tamper(run_dir, ".metadata", pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"it declares head\.out.weight an object, which could be code"):
        check_pickles(checkpoint)


def test_our_own_checkpoints_hold_no_objects(run_dir):
    metadata = pickle.loads((run_dir / "checkpoints" / "step_00000002" / ".metadata").read_bytes())
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}


def test_a_common_file_that_would_run_code_is_refused(run_dir):
    file = io.BytesIO()
    torch.save({"optimizer": touch()}, file)
    checkpoint = tamper(run_dir, "common.pt", file.getvalue())
    with pytest.raises(ConfigError, match=r"common\.pt is rejected: "):
        check_pickles(checkpoint)
    assert_nothing_ran(run_dir)


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_every_command_that_loads_rejects_it_with_one_message(command, run_dir):
    tamper(run_dir, ".metadata", METADATA["os.system"][0])
    arguments = {
        "train": [*SMALL, "train.steps=4", "optim.warmup_steps=1", f"run.dir={run_dir}"],
        "evaluate": [f"from={run_dir}"],
        "predict": [f"from={run_dir}", f"images={Path(__file__).parent.parent.parent / 'docs' / 'pictures'}"],
    }[command]
    code, output = run_ranks(main_here, 1, [command, *arguments])[0]
    assert code == 2, output
    assert "it names posix.system; megavit's checkpoints never contain that" in output
    assert output.count("megavit: ") == 1
    assert_nothing_ran(run_dir)


def test_loading_in_python_refuses_it_too(run_dir):
    tamper(run_dir, ".metadata", METADATA["builtins.eval"][0])
    with pytest.raises(AssertionError, match=r"it names builtins\.eval"):
        run_ranks(load, 1, str(run_dir))
    assert_nothing_ran(run_dir)


def load(run_dir: str) -> None:
    import megavit

    megavit.load(run_dir)
