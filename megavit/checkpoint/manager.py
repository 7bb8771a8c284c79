"""The checkpoints of a run: written whole or not at all, looked through before anything is loaded, thinned out.

`RUN/checkpoints/step_00001000/` holds Megatron-Core's shards, `run.yaml` (the resolved configuration), `state.json`
(schema version, step, consumed samples) and `manifest.json` (size and sha256 of each other file). It is written under a
temporary name, synced and renamed; `RUN/checkpoints/latest` then names it, and `RUN/checkpoints/best` the one that
evaluated best.
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
        """Every checkpoint, whole or not, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if is_checkpoint_name(path.name)), key=step_of, reverse=True)

    def remove_partial(self) -> None:
        """Put in order what a killed run has left: half of a save, half of a removal.

        The one rank calls this whose run it is, before anything else.
        """
        for aside in self.folder.glob(".step_*.old"):
            # It made room for another checkpoint of its step, which then was not completed.
            final = self.folder / aside.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                os.replace(aside, final)
        for pattern in (".step_*.tmp", ".step_*.old", ".step_*.gone"):
            for rest in self.folder.glob(pattern):
                shutil.rmtree(rest, ignore_errors=True)

    def latest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint of which every byte is as it was written, and a warning for each thing that is not.

        One rank calls this.
        """
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
        return best if best is not None and is_checkpoint_name(best.name) and best.is_dir() else None

    def best_metrics(self) -> dict[str, float]:
        """The evaluation of the best checkpoint, empty where there is none."""
        best = self.best()
        return {} if best is None or find_fault(best) is not None else read_state(best).metrics

    def name_best(self, checkpoint: Path) -> None:
        """Have `best` name a checkpoint of this store; the one before goes, if it stayed for that alone.

        One rank calls this.
        """
        former = self.best()
        point_to(checkpoint, by="best")
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
        found, warnings = self.latest_valid()
        if found is None and self.all():
            raise ConfigError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(warnings)}. Move the folder away to start anew"
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
                f"checkpoint.resume={resume} is no checkpoint: give a run folder, one of its checkpoints/step_… "
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
        """Begin a checkpoint: what it holds is fixed when this returns, and written in the background.

        Every rank calls this, and then `finish` of what it returns.

        Args:
            chunks: this rank's stages by name, unwrapped.
            optimizer: theirs; None to save the weights alone.
            state: where the run stands.
            run_yaml: the resolved configuration.
            averages: the weights' averages by chunk and name, if any.
            copy_to_host: whether weights or optimizer will change before it is finished.

        Raises:
            ConfigError: on every rank, if the disk refuses; what was there is whole.
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
        """Write a checkpoint, as `begin` and `finish`; every rank calls this.

        Returns:
            The checkpoint's final path.

        Raises:
            ConfigError: on every rank, if the disk of any of them is full or refuses; what was there is whole.
        """
        return self.begin(chunks, optimizer, state, run_yaml=run_yaml, averages=averages, copy_to_host=False).finish()


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
