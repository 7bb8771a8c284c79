"""Settings of tensor, pipeline and data parallelism."""

from dataclasses import dataclass
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number


class Recompute(Enum):
    """The activations that the backward pass recomputes.

    `selective` recomputes, in every layer, the outputs of both norms, of fc1 and of GELU: of the saved bytes per token
    and layer, 8h + (8h + 4f)/tp in bf16, 4h + 8h/tp remain. `full` keeps only each layer's input.
    """

    none = "none"
    selective = "selective"
    full = "full"


class RecomputeMethod(Enum):
    """The layers that full recompute covers: groups of equal size over all layers, or the first ones of a stage."""

    uniform = "uniform"
    block = "block"


@dataclass
class ParallelConfig:
    """Group `parallel`. The data-parallel size is world size / (tp · pp).

    Attributes:
        tp: tensor-parallel size, the ranks over which each layer's matrices are split.
        pp: pipeline-parallel size, the ranks over which the layers are split.
        vpp: virtual pipeline size: interleaved stages per pipeline rank; the bubble shrinks by this factor.
        sequence_parallel: keep the tokens between the matrices split over the tensor-parallel ranks. Not run on a GPU.
        stages: encoder layers of each of the pp · vpp stages, in the order of the layers; null balances them by FLOPs.
        recompute: which activations the backward pass recomputes. Not run on a GPU: selective, full.
        recompute_method: with `full`, which layers; null is uniform.
        recompute_layers: with `full`, layers per group (uniform) or recomputed layers per stage (block); null is 1.
        overlap_grad_reduce: reduce gradients over the data-parallel ranks during the backward pass. Not run on a GPU.
        bucket_size: number of weights whose gradients are reduced together during the backward pass; null takes the
            larger of 40 million and a million per data-parallel rank, as Megatron-Core does. Smaller buckets start
            earlier and use the network less well. Only the first pipeline stage has more than one bucket.
        overlap_param_gather: gather updated weights during the next forward pass. Not run on a GPU.
        overlap_p2p: send between stages during computation; for interleaved pipelines only. Not run on a GPU.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    sequence_parallel: bool = False
    stages: list[int] | None = None
    recompute: Recompute = Recompute.none
    recompute_method: RecomputeMethod | None = None
    recompute_layers: int | None = None
    overlap_grad_reduce: bool = False
    bucket_size: int | None = None
    overlap_param_gather: bool = False
    overlap_p2p: bool = False

    @property
    def num_stages(self) -> int:
        """Return the number of pipeline stages."""
        return self.pp * self.vpp

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of ranks that hold the same weights and train on different images.

        Raises:
            ConfigError: if the world does not divide into tp · pp.
        """
        model_ranks = self.tp * self.pp
        if world_size % model_ranks:
            fits = sorted(
                {max(1, world_size // model_ranks) * model_ranks, (world_size // model_ranks + 1) * model_ranks}
            )
            raise ConfigError(
                f"world size {world_size} is not a multiple of parallel.tp={self.tp} × parallel.pp={self.pp} = "
                f"{model_ranks}; launch {' or '.join(map(str, fits))} ranks (run.ranks), or lower parallel.tp or "
                f"parallel.pp"
            )
        return world_size // model_ranks

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        require_number("parallel", self, "tp", "pp", "vpp", "bucket_size", at_least=1)
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"parallel.vpp={self.vpp} interleaves the stages of a pipeline, and parallel.pp=1 has none; raise "
                f"parallel.pp or set parallel.vpp=1"
            )
        if self.overlap_p2p and self.vpp == 1:
            raise ConfigError("parallel.overlap_p2p=true needs an interleaved pipeline; set parallel.vpp=2 or more")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError(
                "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true, whose buckets it uses"
            )
        if self.bucket_size is not None and not self.overlap_grad_reduce:
            raise ConfigError(
                f"parallel.bucket_size={self.bucket_size} would be ignored: without parallel.overlap_grad_reduce=true "
                f"all gradients are reduced at once; set it to null"
            )
        self._check_recompute()
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true splits tokens over tensor-parallel ranks, and parallel.tp=1 has one; "
                "raise parallel.tp or set parallel.sequence_parallel=false"
            )

    def _check_recompute(self) -> None:
        if self.recompute is not Recompute.full:
            for key in ("recompute_method", "recompute_layers"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"parallel.{key} would be ignored by parallel.recompute={self.recompute.value}; set it to "
                        f"null, or parallel.recompute=full"
                    )
        elif self.recompute_layers is not None and self.recompute_layers < 1:
            raise ConfigError(
                f"parallel.recompute_layers={self.recompute_layers} saves nothing; set at least 1, or "
                f"parallel.recompute=none"
            )
