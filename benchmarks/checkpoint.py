"""Time saving and loading a ViT-B/16 with its optimizer on two processes, and compare with torch's two ways.

    python -m benchmarks.checkpoint [FOLDER] [parallel.tp=2] [rounds=5]

The candidates are megavit, torch.distributed.checkpoint and torch.save. The benchmark prints a readable line for each
candidate, and one JSON line: medians and extremes in seconds, megabytes, versions. All candidates write and sync the
same tensors. Only megavit also hashes every byte, and verifies the hashes before a load.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavit.config.validate import validate
from megavit.runtime.startup import gc_paused
from tests.distributed import run_ranks

RANKS = 2
SETTINGS = ["recipe=null", "model=vit_b16", "data=synthetic", "train.steps=1", "train.global_batch=2"]


def measure(overrides: list[str], folder: str, rounds: int) -> dict[str, Any]:
    """Time every candidate in each round; every rank calls this."""
    # A run imports with the garbage collector paused, too.
    with gc_paused():
        import torch
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        from megavit.checkpoint import shards
        from megavit.checkpoint.manifest import find_fault
        from megavit.checkpoint.state import TrainingState
        from megavit.config.compose import compose
        from megavit.config.saved import to_yaml
        from megavit.train.trainer import Trainer

        config = compose([*SETTINGS, *overrides, f"run.dir={folder}/run"])
        validate(config, RANKS)
        trainer = Trainer(config, evaluates=False, saves=False)
    trainer.run()
    rank, root = dist.get_rank(), Path(folder)
    saves = iter(range(1, 10**6))

    def own() -> dict[str, torch.Tensor]:
        """Return the tensors that this rank writes, without copies."""
        state = shards.sharded_state(trainer.chunks, trainer.optimizer, None, is_loading=False)
        found = (s for s in nested_values(state) if isinstance(getattr(s, "data", None), torch.Tensor))
        return {f"{rank}.{s.key}": s.data.detach() for s in found if not _is_replica(s)}

    flat = own()
    num_bytes = [0] * RANKS
    dist.all_gather_object(num_bytes, sum(tensor.nbytes for tensor in flat.values()))

    def begin(*, copy_to_host: bool) -> Any:
        state = TrainingState(next(saves), 0, {})
        return trainer.store.begin(
            trainer.chunks, trainer.optimizer, state, run_yaml=trainer_yaml, copy_to_host=copy_to_host
        )

    def save_in_background() -> float:
        start = time.perf_counter()
        save = begin(copy_to_host=True)
        stalled = time.perf_counter() - start
        # Sleep instead of training, which would compete for the CPU.
        while not save.is_written:
            time.sleep(0.01)
        dist.barrier()
        start = time.perf_counter()
        save.finish()
        return stalled + time.perf_counter() - start

    def load() -> None:
        if rank == 0:
            assert find_fault(trainer.store.all()[0]) is None
        dist.barrier()
        shards.load(trainer.store.all()[0], trainer.chunks, trainer.optimizer)

    def dcp_in_background() -> float:
        start = time.perf_counter()
        saving = dcp.async_save(dict(flat), checkpoint_id=str(root / "dcp"))
        stalled = time.perf_counter() - start
        saving.result()
        return stalled

    def torch_save() -> None:
        with (root / f"rank_{rank}.pt").open("wb") as file:
            torch.save(flat, file)
            os.fsync(file.fileno())

    trainer_yaml = to_yaml(config)
    candidates: dict[str, Callable[[], Any]] = {
        "megavit save": lambda: begin(copy_to_host=False).finish() and None,
        "megavit load": load,
        "megavit async stall": save_in_background,
        "dcp save": lambda: dcp.save(dict(flat), checkpoint_id=str(root / "dcp")) and None,
        "dcp load": lambda: dcp.load(dict(flat), checkpoint_id=str(root / "dcp")),
        "dcp async stall": dcp_in_background,
        "torch save": torch_save,
        "torch load": lambda: torch.load(root / f"rank_{rank}.pt", weights_only=True) and None,
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    families = ["megavit", "dcp", "torch"]
    for number in range(rounds):
        # Rotate the order: data that one candidate has written slow the next one down.
        turn = number % len(families)
        for name in [
            name for family in families[turn:] + families[:turn] for name in candidates if name.split()[0] == family
        ]:
            candidate = candidates[name]
            if rank == 0:
                trainer.store.prune(keep_last=1, keep_every=None)
                if name in ("dcp save", "dcp async stall"):
                    shutil.rmtree(root / "dcp", ignore_errors=True)
                # Sync first, so that no candidate pays for another's writes.
                os.sync()
            dist.barrier()
            start = time.perf_counter()
            own_measure = candidate()
            if not isinstance(own_measure, float):
                dist.barrier()
                own_measure = time.perf_counter() - start
            everyone = [0.0] * RANKS
            dist.all_gather_object(everyone, own_measure)
            seconds[name].append(max(everyone))
    return {"seconds": seconds, "bytes": sum(num_bytes)}


def _is_replica(shard: Any) -> bool:
    replica = shard.replica_id
    return bool(any(replica) if isinstance(replica, tuple) else replica)


def main(arguments: list[str]) -> None:
    """Run the benchmark, and print the table and the JSON line."""
    from megavit.metrics.provenance import provenance

    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    rounds = int(given.pop("rounds", 5))
    where = next((argument for argument in arguments if "=" not in argument), None)
    folder = Path(tempfile.mkdtemp(dir=where, prefix="megavit_bench_"))
    try:
        overrides = [f"{name}={value}" for name, value in given.items()]
        measured = run_ranks(measure, RANKS, overrides, str(folder), rounds, timeout_s=900)[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    megabytes = measured["bytes"] / 1e6
    rows = {}
    for name, seconds in measured["seconds"].items():
        median = statistics.median(seconds)
        rows[name] = {"median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
        print(f"{name:20} {median:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  {megabytes / median:6.0f} MB/s")
    print(json.dumps({"bench": "checkpoint", "settings": given, "megabytes": megabytes, **rows, **provenance()}))


if __name__ == "__main__":
    main(sys.argv[1:])
