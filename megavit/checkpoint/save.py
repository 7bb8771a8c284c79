"""Save one checkpoint: write under a temporary name, sync, rename, then update `latest`."""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavit.checkpoint.manifest import describe, write_manifest
from megavit.checkpoint.shard_writer import ShardWriter, Written
from megavit.checkpoint.state import TrainingState, write_state
from megavit.errors import ConfigError
from megavit.parallel.collectives import gather_objects, raise_on_all_ranks

_NAME = re.compile(r"step_(\d{8,})")


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder name is that of a completed checkpoint."""
    return _NAME.fullmatch(name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None
    return int(found.group(1))


def point_to(checkpoint: Path, *, by: str) -> None:
    """Write a checkpoint's name into a file next to it, atomically."""
    new = checkpoint.with_name(f".{by}.tmp")
    new.write_text(checkpoint.name)
    os.replace(new, checkpoint.with_name(by))


class PendingSave:
    """A checkpoint that is being written in the background; all ranks construct it together.

    Args:
        final: path of the completed checkpoint.
        shards: this rank's shards.
        state: the run's step and counters.
        run_yaml: the resolved configuration.
        copy_to_host: whether the tensors will change before `finish`.

    Raises:
        ConfigError: on every rank, if the folder cannot be created.
    """

    def __init__(
        self, final: Path, shards: dict[str, Any], state: TrainingState, *, run_yaml: str, copy_to_host: bool
    ) -> None:
        self.final, self.state, self.num_bytes = final, state, 0
        self._run_yaml, self._temporary = run_yaml, final.with_name(f".{final.name}.tmp")
        self._speaks = dist.get_rank() == 0

        def make_room() -> None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)

        with self._describe():
            _together(make_room if self._speaks else None)
        self._writer = ShardWriter(shards, self._temporary, copy_to_host=copy_to_host)
        self._written = self._writer.start()

    @property
    def is_written(self) -> bool:
        """Return whether this rank has finished writing, or has failed."""
        return self._written.done()

    def finish(self) -> Path:
        """Wait for every rank's files and complete the checkpoint; every rank calls this.

        Returns:
            The final path.

        Raises:
            ConfigError: on every rank, if writing fails on any of them; earlier checkpoints stay valid.
        """
        with self._describe():
            written = _together(self._written.result)
            everyone = gather_objects(written)
            self.num_bytes = sum(int(entry["size"]) for part in everyone for entry in part.files.values())
            _together((lambda: self._complete(everyone)) if self._speaks else None)
        return self.final

    def _complete(self, everyone: list[Written]) -> None:
        folder, final = self._temporary, self.final
        self._writer.write_metadata(everyone)
        (folder / "run.yaml").write_text(self._run_yaml)
        write_state(folder, self.state)
        files = {name: entry for written in everyone for name, entry in written.files.items()}
        beside = [path.name for path in folder.iterdir() if path.name not in files]
        write_manifest(folder, {**files, **describe(folder, beside)})
        _sync(folder)
        # An existing checkpoint of this step is moved aside first, so that `latest` always names a valid one.
        aside = final.with_name(f".{final.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.replace(final, aside)
        os.replace(folder, final)
        point_to(final, by="latest")
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _describe(self) -> Iterator[None]:
        """Describe a write error and the state that it leaves."""
        try:
            yield
        except ConfigError as error:
            if self._speaks:
                shutil.rmtree(self._temporary, ignore_errors=True)
            beside = sorted(path.name for path in self.final.parent.glob("step_*") if is_checkpoint_name(path.name))
            remedy = (
                f"{beside[-1]} is valid, run again to continue from it" if beside else "there was no earlier checkpoint"
            )
            raise ConfigError(f"the checkpoint {self.final} cannot be written: {error}; {remedy}") from error


def _together(part: Callable[[], Any] | None) -> Any:
    """Do this rank's part of a save, if any, and raise a write error of any rank on all of them."""
    done, refused = None, None
    try:
        done = part() if part is not None else None
    except OSError as error:
        refused = f"{error.strerror} on {socket.gethostname()}"
    raise_on_all_ranks(refused)
    return done


def _sync(folder: Path) -> None:
    """Sync the files of this rank's machine to disk before the folder is renamed."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
