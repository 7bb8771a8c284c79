"""Manage the checkpoints of a run: write them atomically, verify them before loading, delete old ones.

`RUN/checkpoints/step_00001000/` holds Megatron-Core's shards, `run.yaml` (the resolved configuration), `state.json`
(schema version, step, consumed samples) and `manifest.json` (size and sha256 of each other file). It is written under a
temporary name, synced and renamed; `RUN/checkpoints/latest` then names it, and `RUN/checkpoints/best` names the one
with the best evaluation.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule

from megavit.checkpoint.manifest import find_fault
from megavit.checkpoint.save import PendingSave, is_checkpoint_name, name_of, point_to, step_of
from megavit.checkpoint.shards import Averages, sharded_state
from megavit.checkpoint.state import TrainingState, read_state
from megavit.errors import ConfigError


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Path]:
        """Return every checkpoint, valid or not, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if is_checkpoint_name(path.name)), key=step_of, reverse=True)

    def remove_partial(self) -> None:
        """Clean up after a killed run: partial saves and partial removals.

        Rank 0 calls this before anything else.
        """
        for aside in self.folder.glob(".step_*.old"):
            # This checkpoint was moved aside for another one of its step, which was not completed.
            final = self.folder / aside.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                os.replace(aside, final)
        for pattern in (".step_*.tmp", ".step_*.old", ".step_*.gone"):
            for rest in self.folder.glob(pattern):
                shutil.rmtree(rest, ignore_errors=True)

    def latest_valid(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint that passes verification, and a warning for each newer one that does not.

        One rank calls this.
        """
        warnings = []
        latest = self.folder / "latest"
        if latest.exists() and not (named := latest.read_text(errors="replace").strip()).startswith("step_"):
            warnings.append(f"{latest} is broken (it holds {named[:40]!r}); the newest valid checkpoint is used")
        for path in self.all():
            fault = find_fault(path)
            if fault is None:
                return path, warnings
            warnings.append(f"{fault}; {path.name} is ignored, and an older checkpoint is used")
        return None, warnings

    def best(self) -> Path | None:
        """Return the checkpoint that `best` names, None if there is none."""
        file = self.folder / "best"
        best = self.folder / file.read_text(errors="replace").strip() if file.exists() else None
        return best if best is not None and is_checkpoint_name(best.name) and best.is_dir() else None

    def best_metrics(self) -> dict[str, float]:
        """Return the evaluation metrics of the best checkpoint, empty if there is none."""
        best = self.best()
        return {} if best is None or find_fault(best) is not None else read_state(best).metrics

    def name_best(self, checkpoint: Path) -> None:
        """Make `best` name a checkpoint of this run, and remove the previous best unless it is a periodic checkpoint.

        One rank calls this.
        """
        former = self.best()
        point_to(checkpoint, by="best")
        if former is not None and former != checkpoint and not _is_due(former):
            _remove(former)

    def prune(self, *, keep_last: int | None, keep_every: int | None, spare: Path | None = None) -> list[Path]:
        """Remove old checkpoints; the newest and the best are always kept.

        One rank calls this.

        Args:
            keep_last: number of the newest periodic checkpoints to keep; None keeps all.
            keep_every: also keep checkpoints of steps that this divides.
            spare: a checkpoint to keep in any case; required unless the newest is known to be valid.

        Returns:
            The removed checkpoints.
        """
        if keep_last is None:
            return []
        every = self.all()
        stay = {*every[:1], spare, self.best(), *[path for path in every if _is_due(path)][:keep_last]}
        gone = [path for path in every if path not in stay and not (keep_every and step_of(path) % keep_every == 0)]
        for path in gone:
            _remove(path)
        return gone

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """Resolve `checkpoint.resume` to a valid checkpoint.

        One rank calls this.

        Returns:
            The checkpoint, or None to start from scratch; and a warning for each broken checkpoint.

        Raises:
            ConfigError: if a named checkpoint is missing or broken, if all are broken, or if `never` would mix two runs
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
        found, warnings = self.latest_valid()
        if found is None and self.all():
            raise ConfigError(
                f"no checkpoint in {self.folder} is valid: {'; '.join(warnings)}. Move the folder away to start from "
                f"scratch"
            )
        if found is not None or resume == "auto":
            return found, warnings
        path = Path(resume)
        named: Path | None = path
        if (path / "checkpoints").is_dir():
            named, warnings = CheckpointManager(path / "checkpoints").latest_valid()
        fault = find_fault(named) if named is not None and named.is_dir() else None
        if named is None or not named.is_dir() or (fault is not None and fault.file.name == "metadata.json"):
            raise ConfigError(
                f"checkpoint.resume={resume} is not a checkpoint: give a run folder, one of its checkpoints/step_… "
                f"folders, auto or never"
            )
        if fault is not None:
            raise ConfigError(f"checkpoint.resume={resume} is broken: {fault}; choose another")
        return named, warnings

    def begin(
        self,
        chunks: Mapping[str, MegatronModule],
        optimizer: MegatronOptimizer | None,
        state: TrainingState,
        *,
        run_yaml: str,
        averages: Averages | None = None,
        copy_to_host: bool = True,
    ) -> PendingSave:
        """Begin a checkpoint: its content is fixed when this returns, and is written in the background.

        Every rank calls this, and then calls `finish` of the returned object.

        Args:
            chunks: this rank's stages by name, unwrapped.
            optimizer: the optimizer of these stages; None to save only the weights.
            state: the run's step and counters.
            run_yaml: the resolved configuration.
            averages: moving averages of the weights, by chunk and name; None for none.
            copy_to_host: whether weights or optimizer will change before `finish`.

        Raises:
            ConfigError: on every rank, if writing fails; earlier checkpoints stay valid.
        """
        return PendingSave(
            self.folder / name_of(state.step),
            sharded_state(chunks, optimizer, averages, is_loading=False),
            state,
            run_yaml=run_yaml,
            copy_to_host=copy_to_host,
        )

    def save(
        self,
        chunks: Mapping[str, MegatronModule],
        optimizer: MegatronOptimizer | None,
        state: TrainingState,
        *,
        run_yaml: str,
        averages: Averages | None = None,
    ) -> Path:
        """Write a checkpoint with `begin` and `finish`; every rank calls this.

        Returns:
            The checkpoint's final path.

        Raises:
            ConfigError: on every rank, if writing fails on any of them; earlier checkpoints stay valid.
        """
        return self.begin(chunks, optimizer, state, run_yaml=run_yaml, averages=averages, copy_to_host=False).finish()


def _is_due(checkpoint: Path) -> bool:
    try:
        return read_state(checkpoint).due
    except ConfigError:
        # A broken checkpoint does not count towards keep_last.
        return False


def _remove(checkpoint: Path) -> None:
    # Rename first: a partly removed checkpoint would look like a broken one.
    going = checkpoint.with_name(f".{checkpoint.name}.gone")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going)
