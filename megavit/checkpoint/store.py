"""Sharded checkpoints: written beside the training by every rank, read back into any layout.

`RUN/checkpoints/step_00001000/` holds Megatron-Core's shards, `run.yaml` (the resolved configuration) and
`state.json` (schema version, step, consumed samples). It is written under a temporary name and renamed when whole;
`RUN/checkpoints/latest` then names it, and `RUN/checkpoints/best` the one that evaluated best.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megavit.checkpoint.writer import write_in_threads
from megavit.errors import ConfigError
from megavit.parallel.agree import agree_on_error

SCHEMA_VERSION = 1

# Of Megatron-Core's forms of the distributed optimizer's state, the one that loads in every layout (0.16.1).
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}

# Before the keys of the weights' averages.
_AVERAGES = "average."

# By chunk and by the parameter's name within it.
Averages = Mapping[str, Mapping[str, Tensor]]

# What the checkpoint, not the configuration, decides in an optimizer's parameter group.
_FROM_CHECKPOINT = ("params", "step")


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands; with the configuration, all that data order, dropout and schedule depend on.

    Attributes:
        step: optimizer steps done.
        consumed_samples: images seen.
        metrics: the last evaluation's, for whoever inspects the checkpoint.
        classes: names of a classifier's classes, in the order of its scores.
        due: saved at its time; else only because it evaluated better than all before.
    """

    step: int
    consumed_samples: int
    metrics: dict[str, float]
    classes: list[str] = field(default_factory=list)
    due: bool = True


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The checkpoint that `latest` names, None where there is none yet."""
        return self._named("latest")

    def best(self) -> Path | None:
        """The checkpoint that `best` names, None where there is none yet."""
        return self._named("best")

    def best_metrics(self) -> dict[str, float]:
        """The evaluation of the best checkpoint, empty where there is none."""
        best = self.best()
        return {} if best is None or not is_complete(best) else read_state(best).metrics

    def name_best(self, checkpoint: Path) -> None:
        """Have `best` name a checkpoint of this store; the one before goes, if it stayed for that alone.

        One rank calls this.
        """
        former = self.best()
        self._name("best", checkpoint)
        if former is not None and former != checkpoint and is_complete(former) and not read_state(former).due:
            shutil.rmtree(former)

    def _named(self, pointer: str) -> Path | None:
        file = self.folder / pointer
        return self.folder / file.read_text().strip() if file.exists() else None

    def _name(self, pointer: str, checkpoint: Path) -> None:
        new = self.folder / f".{pointer}.tmp"
        new.write_text(checkpoint.name)
        os.replace(new, self.folder / pointer)

    def find(self, resume: str) -> Path | None:
        """Resolve `checkpoint.resume` to a checkpoint, or None to start anew.

        Raises:
            ConfigError: if a named one is not there, or `never` would mix two runs in one folder.
        """
        newest = self.newest()
        if resume == "auto" or (resume != "never" and newest is not None):
            return newest
        if resume == "never":
            if newest is not None:
                raise ConfigError(
                    f"checkpoint.resume=never, but {self.folder} already holds checkpoints up to {newest.name}; "
                    f"choose another run.name or run.dir, or move that folder away"
                )
            return None
        path = Path(resume)
        named = CheckpointStore(path / "checkpoints").newest() if (path / "checkpoints").is_dir() else path
        if named is None or not is_complete(named):
            raise ConfigError(
                f"checkpoint.resume={resume} is no checkpoint: give a run folder, one of its checkpoints/step_… "
                f"folders, auto or never"
            )
        return named

    def save(
        self,
        chunks: Mapping[str, MegatronModule],
        optimizer: MegatronOptimizer,
        state: TrainingState,
        *,
        run_yaml: str,
        averages: Averages | None = None,
    ) -> Path:
        """Write a checkpoint; every rank calls this.

        Args:
            chunks: this rank's stages by name, unwrapped.
            optimizer: theirs.
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
            dist_checkpointing.save(_sharded_state(chunks, optimizer, averages, is_loading=False), str(temporary))

        def complete() -> None:
            (temporary / "run.yaml").write_text(run_yaml)
            _write_json(temporary / "state.json", {"schema_version": SCHEMA_VERSION, **asdict(state)})
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
        speaks = dist.get_rank() == 0
        try:
            for part in (make_room if speaks else None, write_shards, complete if speaks else None):
                agree_on_error(_refused_by_the_disk(part))
        except ConfigError as error:
            if speaks:
                shutil.rmtree(temporary, ignore_errors=True)
            newest = self.newest()
            kept = f"{newest.name} is whole, run again to go on from it" if newest is not None else "none was there yet"
            raise ConfigError(f"the checkpoint {final} cannot be written: {error}; {kept}") from error
        return final


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


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a whole checkpoint: both Megatron-Core's last file and ours are there."""
    return (checkpoint / "metadata.json").exists() and (checkpoint / "state.json").exists()


def read_state(checkpoint: Path) -> TrainingState:
    """Read where a checkpoint stands.

    Raises:
        ConfigError: if a later megavit wrote it.
    """
    fields = json.loads((checkpoint / "state.json").read_text())
    version = fields.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{checkpoint} has schema version {version} and this megavit reads {SCHEMA_VERSION}; use the megavit "
            f"that wrote it"
        )
    return TrainingState(**fields)


def load(
    checkpoint: Path,
    chunks: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer,
    *,
    averages: Averages | None = None,
) -> None:
    """Read a checkpoint of any layout into this one, in place; every rank calls this.

    Learning rate, weight decay and the like stay as configured: a checkpoint holds state, not settings.

    Args:
        checkpoint: a whole checkpoint of the same model.
        chunks: this rank's stages by name, unwrapped.
        optimizer: theirs.
        averages: where to put the weights' averages, if the checkpoint holds them and they are wanted.
    """
    settings = [
        {key: value for key, value in group.items() if key not in _FROM_CHECKPOINT} for group in optimizer.param_groups
    ]
    loaded: dict[str, Any] = dist_checkpointing.load(
        _sharded_state(chunks, optimizer, averages, is_loading=True), str(checkpoint)
    )
    for name, chunk in chunks.items():
        chunk.load_state_dict(loaded[name], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for name, weights in (averages or {}).items():
        for key, weight in weights.items():
            weight.copy_(loaded["averages"][name][key])


def load_weights(checkpoint: Path, chunks: Mapping[str, MegatronModule]) -> None:
    """Read the weights alone, in place, in any layout; every rank calls this.

    Args:
        checkpoint: a whole checkpoint of the same model.
        chunks: this rank's stages by name.
    """
    state = {name: chunk.sharded_state_dict(metadata=dict(_SHARDING)) for name, chunk in chunks.items()}
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    for name, chunk in chunks.items():
        chunk.load_state_dict(loaded[name], strict=True)


def _sharded_state(
    chunks: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer,
    averages: Averages | None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = dict(_SHARDING)
    state: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in chunks.items()}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if averages is not None:
        state["averages"] = {name: _sharded_averages(chunk, averages[name]) for name, chunk in chunks.items()}
    return state


def _sharded_averages(chunk: MegatronModule, weights: Mapping[str, Tensor]) -> dict[str, ShardedTensor]:
    """A chunk's averages, sharded as its weights are, under keys of their own."""
    shards = chunk.sharded_state_dict(prefix=_AVERAGES, metadata=dict(_SHARDING))
    return {
        name: replace(shards[f"{_AVERAGES}{name}"], data=weight, dtype=weight.dtype) for name, weight in weights.items()
    }


def _sync(folder: Path) -> None:
    """Have the files of this rank's machine on the disk before the folder's new name says that they are."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
