"""Build, check, time and profile the candidates of one process."""

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.baselines import build_baseline
from benchmarks.step.cases import OWN
from benchmarks.step.device_rates import Machine
from benchmarks.step.megavit_step import Megavit, time_loop, timed
from benchmarks.step.memory import saved_bytes, storage_bytes
from benchmarks.step.offload import CpuOffload
from benchmarks.step.profile import profile
from benchmarks.step.workload import Candidate, prepare_work
from megavit.config.compose import compose
from megavit.config.validate import validate
from megavit.parallel.layout import ParallelLayout, world_size_from_environment


class CaseRunner:
    """One process's candidates for one row.

    Args:
        overrides: settings of megavit's run.
    """

    def __init__(self, overrides: list[str]) -> None:
        self._overrides, self._config = overrides, (config := compose(overrides))
        validate(config, world_size_from_environment())
        self._layout = ParallelLayout.create(config.parallel, timeout_s=config.run.timeout_s)
        self._work = prepare_work(config, self._layout.device)
        self._candidates: dict[str, Candidate] = {}
        self._timm_weights: dict[str, Tensor] | None = None
        self._offload = CpuOffload(self._layout.device)

    def about(self) -> dict[str, Any]:
        """Return the name of the device, and the number of threads."""
        device = self._layout.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return {"device": name, "threads": torch.get_num_threads()}

    def build(self, name: str) -> None:
        """Build a candidate with megavit's weights."""
        self._offload.offload(self._candidates)
        if not name.startswith("megavit"):
            assert self._timm_weights is not None, "megavit comes first"
            # Clone the weights, because some libraries modify them in place.
            weights = {key: weight.clone() for key, weight in self._timm_weights.items()}
            self._candidates[name] = build_baseline(name, self._work, weights)
            return
        config = compose([*self._overrides, *OWN[name]])
        validate(config, self._layout.world_size)
        step = Megavit(self._work, config, self._layout)
        self._candidates[name] = step
        if self._timm_weights is None and self._layout.world_size == 1:
            # The baselines, which train in one process, start from these weights.
            self._timm_weights = step.timm_weights()

    def outputs(self, name: str) -> tuple[Any, float]:
        """Return the network's output, as a NumPy array, and its loss."""
        output, loss = self._ready(name).outputs()
        return output.numpy(), loss

    def warm_up(self, name: str, steps: int) -> float:
        """Run steps that are the same for all candidates, and return the seconds of the last one."""
        step = self._ready(name).step
        seconds = [timed(lambda: step(shared_masks=True), 1, self._layout.device) for _ in range(steps)]
        return seconds[-1]

    def run(self, name: str, steps: int) -> float:
        """Return the seconds of a number of steps."""
        return timed(self._ready(name).step, steps, self._layout.device)

    def memory(self, name: str) -> dict[str, int]:
        """Return a step's peak bytes on a GPU; on a CPU the bytes held between steps, and saved for backward."""
        candidate, device = self._ready(name), self._layout.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            candidate.step()
            return {"peak_bytes": torch.cuda.max_memory_allocated(device)}
        held = candidate.held()
        return {"held_bytes": storage_bytes(held), "saved_bytes": saved_bytes(candidate.forward, held)}

    def profile(self, name: str) -> dict[str, float]:
        """Return the seconds of one step by kind of kernel."""
        return profile(self._ready(name).step, self._layout.device)

    def rates(self) -> dict[str, float]:
        """Measure the device's own matmul and copy rates."""
        # Allocate the matrices each time: otherwise they would count as memory of a candidate.
        self._offload.offload(self._candidates)
        return Machine(self._layout.device, self._work.dtype).rates()

    def loop(self, run_dir: str, rounds: int, steps: int, until: float) -> dict[str, list[float]]:
        """Return the seconds of each turn of the trainer and of the bare step."""
        bare = self._ready("megavit")
        assert isinstance(bare, Megavit)
        config = self._config
        config = replace(
            config,
            run=replace(config.run, dir=run_dir, preflight=False),
            checkpoint=replace(config.checkpoint, save_every=None, best=False),
            metrics=replace(config.metrics, log_every=steps),
        )
        with redirect_stdout(StringIO()):
            return time_loop(config, bare, rounds=rounds, steps=steps, until=until)

    def drop(self, name: str) -> None:
        """Remove a candidate and free its memory."""
        self._candidates.pop(name, None)
        self._offload.discard(name)
        if self._layout.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ready(self, name: str) -> Candidate:
        candidate = self._candidates[name]
        self._offload.offload({other: one for other, one in self._candidates.items() if other != name})
        self._offload.restore(name)
        return candidate
