"""The checkpoints of a run: written whole or not at all, looked through before anything is loaded, thinned out.

`RUN/checkpoints/step_00001000/` holds Megatron-Core's shards, `run.yaml` (the resolved configuration), `state.json`
(schema version, step, consumed samples) and `manifest.json` (size and sha256 of each other file). It is written under a
temporary name, synced and renamed; `RUN/checkpoints/latest` then names it, and `RUN/checkpoints/best` the one that
evaluated best.
"""

import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from megavit.checkpoint.manifest import Entry, describe, find_fault, write_manifest
from megavit.checkpoint.shards import Averages, sharded_state
from megavit.checkpoint.state import TrainingState, read_state, write_state
from megavit.checkpoint.writer import write_in_threads
from megavit.errors import ConfigError
from megavit.parallel.agree import agree_on_error

_NAME = re.compile(r"step_(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Path]:
        """Every checkpoint, whole or not, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of, reverse=True)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint of which every byte is as it was written, and a warning for each thing that is not.

        One rank calls this.
        """
        self._put_back()
        warnings = []
        latest = self.folder / "latest"
        if latest.exists() and not (named := latest.read_text(errors="replace").strip()).startswith("step_"):
            warnings.append(f"{latest} is torn (it reads {named[:40]!r}); the checkpoints beside it are looked through")
        for path in self.all():
            fault = find_fault(path)
            if fault is None:
                return path, warnings
            warnings.append(f"{fault}; {path.name} is left aside, an older one is taken")
        return None, warnings

    def best(self) -> Path | None:
        """The checkpoint that `best` names, None where there is none."""
        file = self.folder / "best"
        best = self.folder / file.read_text(errors="replace").strip() if file.exists() else None
        return best if best is not None and _NAME.fullmatch(best.name) and best.is_dir() else None

    def best_metrics(self) -> dict[str, float]:
        """The evaluation of the best checkpoint, empty where there is none."""
        best = self.best()
        return {} if best is None or find_fault(best) is not None else read_state(best).metrics

    def name_best(self, checkpoint: Path) -> None:
        """Have `best` name a checkpoint of this store; the one before goes, if it stayed for that alone.

        One rank calls this.
        """
        former = self.best()
        self._name("best", checkpoint)
        if former is not None and former != checkpoint and not _is_due(former):
            _remove(former)

    def prune(self, *, keep_last: int | None, keep_every: int | None, spare: Path | None = None) -> list[Path]:
        """Remove checkpoints; the newest and the best always stay.

        One rank calls this.

        Args:
            keep_last: of those that were due, so many of the newest stay; None keeps all.
            keep_every: those of steps that this divides stay too.
            spare: stays in any case; without it the newest must be known to be whole.

        Returns:
            What was removed.
        """
        if keep_last is None:
            return []
        every = self.all()
        stay = {*every[:1], spare, self.best(), *[path for path in every if _is_due(path)][:keep_last]}
        gone = [path for path in every if path not in stay and not (keep_every and step_of(path) % keep_every == 0)]
        for path in gone:
            _remove(path)
        return gone

    def _name(self, pointer: str, checkpoint: Path) -> None:
        new = self.folder / f".{pointer}.tmp"
        new.write_text(checkpoint.name)
        os.replace(new, self.folder / pointer)

    def _put_back(self) -> None:
        """A checkpoint that was moved aside for another of its step, which then was not completed, comes back."""
        for aside in self.folder.glob(".step_*.old"):
            final = self.folder / aside.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                os.replace(aside, final)

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """Resolve `checkpoint.resume` to a whole checkpoint, or None to start anew; and what is broken, in words.

        One rank calls this.

        Raises:
            ConfigError: if a named one is not there or broken, if every one is broken, or `never` would mix two runs
                in one folder.
        """
        if resume == "never":
            every = self.all()
            if every:
                raise ConfigError(
                    f"checkpoint.resume=never, but {self.folder} already holds checkpoints up to {every[0].name}; "
                    f"choose another run.name or run.dir, or move that folder away"
                )
            return None, []
        found, warnings = self.newest_whole()
        if found is None and self.all():
            raise ConfigError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(warnings)}. Move the folder away to start anew"
            )
        if found is not None or resume == "auto":
            return found, warnings
        path = Path(resume)
        named: Path | None = path
        if (path / "checkpoints").is_dir():
            named, warnings = CheckpointStore(path / "checkpoints").newest_whole()
        fault = find_fault(named) if named is not None and named.is_dir() else None
        if named is None or not named.is_dir() or (fault is not None and fault.file.name == "metadata.json"):
            raise ConfigError(
                f"checkpoint.resume={resume} is no checkpoint: give a run folder, one of its checkpoints/step_… "
                f"folders, auto or never"
            )
        if fault is not None:
            raise ConfigError(f"checkpoint.resume={resume} is broken: {fault}; choose another")
        return named, warnings

    def save(
        self,
        chunks: Mapping[str, MegatronModule],
        optimizer: MegatronOptimizer | None,
        state: TrainingState,
        *,
        run_yaml: str,
        averages: Averages | None = None,
    ) -> Path:
        """Write a checkpoint; every rank calls this.

        Args:
            chunks: this rank's stages by name, unwrapped.
            optimizer: theirs; None to save the weights alone.
            state: where the run stands.
            run_yaml: the resolved configuration.
            averages: the weights' averages by chunk and name, if any.

        Returns:
            The checkpoint's final path.

        Raises:
            ConfigError: on every rank, if the disk of any of them is full or refuses; what was there is whole.
        """
        final = self.folder / f"step_{state.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"

        def make_room() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write_shards() -> None:
            dist_checkpointing.save(sharded_state(chunks, optimizer, averages, is_loading=False), str(temporary))
            # Each rank reads its own back, all at once.
            shards.update(describe(temporary, [path.name for path in temporary.glob(f"__{rank}_*")]))

        def complete() -> None:
            (temporary / "run.yaml").write_text(run_yaml)
            write_state(temporary, state)
            beside = [path.name for path in temporary.iterdir() if path.name not in shards]
            write_manifest(temporary, {**shards, **describe(temporary, beside)})
            _sync(temporary)
            # A checkpoint of this very step is moved aside first: at no moment is `latest` without a whole one.
            aside = self.folder / f".{final.name}.old"
            shutil.rmtree(aside, ignore_errors=True)
            if final.exists():
                os.replace(final, aside)
            os.replace(temporary, final)
            self._name("latest", final)
            shutil.rmtree(aside, ignore_errors=True)

        write_in_threads()
        rank = dist.get_rank()
        speaks, shards = rank == 0, dict[str, Entry]()
        try:
            agree_on_error(_refused_by_the_disk(make_room if speaks else None))
            agree_on_error(_refused_by_the_disk(write_shards))
            shards = _gather(shards)
            agree_on_error(_refused_by_the_disk(complete if speaks else None))
        except ConfigError as error:
            if speaks:
                shutil.rmtree(temporary, ignore_errors=True)
            every = self.all()
            kept = f"{every[0].name} is whole, run again to go on from it" if every else "none was there yet"
            raise ConfigError(f"the checkpoint {final} cannot be written: {error}; {kept}") from error
        return final


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None
    return int(found.group(1))


def _is_due(checkpoint: Path) -> bool:
    try:
        return read_state(checkpoint).due
    except ConfigError:
        # Broken: to be told of, not to be kept for its sake.
        return False


def _remove(checkpoint: Path) -> None:
    # Half removed it would look like a broken one.
    going = checkpoint.with_name(f".{checkpoint.name}.gone")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going)


def _gather(own: dict[str, Entry]) -> dict[str, Entry]:
    everyone: list[dict[str, Entry]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: entry for part in everyone for name, entry in part.items()}


def _refused_by_the_disk(part: Callable[[], None] | None) -> str | None:
    """Do a part of a save; what a disk had against it, None if nothing."""
    if part is None:
        return None
    try:
        part()
    except OSError as error:
        return f"{error.strerror} on {socket.gethostname()}"
    except CheckpointException as error:
        # Megatron-Core tells every rank that some rank failed, and the first one why, in words.
        told = re.search(r"\[Errno \d+\] ([^\n]*)", str(error))
        if told is None and dist.get_rank() == 0:
            raise
        return told.group(1) if told is not None else "another rank failed"
    return None


def _sync(folder: Path) -> None:
    """Have the files of this rank's machine on the disk before the folder's new name says that they are."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
