"""Test that a background save equals a synchronous one, and that a write error destroys no checkpoint."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megavit.checkpoint.manifest import find_fault
from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL

EVERY_STEP = [*SMALL, "train.steps=6", "checkpoint.save_every=2", "optim.ema=0.9", "model.hidden_dropout=0.1"]


def train_with_a_slow_disk(overrides: list[str], write_s: float) -> tuple[dict, float]:
    """Train with a disk so slow that each file takes longer to write than the steps to the next save."""
    from megavit.checkpoint import shard_writer as writer

    quick = writer._write_file

    def write(bucket, transforms):
        time.sleep(write_s)
        return quick(bucket, transforms)

    writer._write_file = write
    try:
        return ranks.train_and_keep(overrides)
    finally:
        writer._write_file = quick


def shards(run_dir: Path) -> dict[str, str]:
    """Return the hash of every file of weights, averages and optimizer state, of all checkpoints."""
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.glob("checkpoints/step_*/*"))
        if path.suffix in (".distcp", ".pt")
    }


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2"],
        pytest.param(["train.precision=bf16_o2"], marks=pytest.mark.slow),
        pytest.param(["optim=sgd", "optim.lr=0.1"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_background_save_writes_the_state_at_its_start(tmp_path, layout):
    waited, background = tmp_path / "waited", tmp_path / "background"
    run_ranks(ranks.train_and_keep, 2, [*EVERY_STEP, *layout, f"run.dir={waited}"])
    at_once = [*EVERY_STEP, *layout, "checkpoint.async_save=true", f"run.dir={background}"]
    first, _ = run_ranks(train_with_a_slow_disk, 2, at_once, 0.5)
    assert shards(waited) == shards(background)
    assert len({name.split("/")[0] for name in shards(waited)}) == 3
    for checkpoint in background.glob("checkpoints/step_*"):
        assert find_fault(checkpoint) is None
    rows = [json.loads(line) for line in (background / "metrics.jsonl").read_text().splitlines()]
    assert first["losses"] == {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    # A save is logged when it is complete, after the steps that follow it.
    output = [(row["split"], row["step"]) for row in rows if row["split"] in ("train", "save")]
    assert output.index(("save", 2)) > output.index(("train", 4))


def save_until_it_fits(disk: str, room: int) -> list[str]:
    """Save repeatedly on a disk with a little more space each time; return each save's error."""
    import torch.distributed as dist

    from megavit.checkpoint.state import TrainingState
    from megavit.config.compose import compose
    from megavit.errors import ConfigError
    from megavit.train.trainer import Trainer

    trainer = Trainer(
        compose([*SMALL, "train.stop_at=1", "run.preflight=false", "parallel.tp=2", f"run.dir={disk}/run"]), saves=False
    )
    trainer.run()
    is_main = dist.get_rank() == 0

    def save(step: int) -> str:
        try:
            trainer.store.save(trainer.chunks, trainer.optimizer, TrainingState(step, step, {}), run_yaml="")
        except ConfigError as error:
            return str(error)
        return ""

    def leave(room: int | None) -> None:
        if is_main:
            ballast = Path(disk) / "ballast"
            ballast.unlink(missing_ok=True)
            if room is not None:
                there = shutil.disk_usage(disk).free
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, there - room))
        dist.barrier()

    output = [save(1)]
    for step in range(2, 40):
        leave((step - 2) * room)
        output.append(save(step))
        assert find_fault(Path(disk) / "run" / "checkpoints" / "step_00000001") is None
        if not output[-1]:
            break
        dist.barrier()
        assert not list(Path(disk).rglob("*.tmp"))
    leave(None)
    if is_main:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    dist.barrier()
    output.append(save(50))
    dist.barrier()
    if is_main:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    dist.barrier()
    output.append(save(51))
    return output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_full_at_any_byte_or_read_only_costs_no_checkpoint(small_disk, figure):
    disk = small_disk("8m")
    first, second = run_ranks(save_until_it_fits, 2, str(disk), 50_000)
    assert find_fault(disk / "run" / "checkpoints" / "step_00000051") is None
    assert first == second
    complete, *full, fits, read_only, again = first
    assert (complete, fits, again) == ("", "", "")
    assert len(full) >= 5
    for message in full:
        assert "cannot be written: No space left on device on " in message
        assert message.endswith("; step_00000001 is valid, run again to continue from it")
    assert "cannot be written: Read-only file system on " in read_only
    figure(
        f"a save on a disk that was full at {len(full)} places, or read-only: refused on both ranks, no other harmed"
    )
