"""Who holds what: the sizes of the parallel dimensions."""

from dataclasses import dataclass

from megavit.errors import ConfigError


@dataclass
class ParallelConfig:
    """Group `parallel`. Data parallelism is what is left: world size / (tp · pp).

    Attributes:
        tp: tensor-parallel size, the ranks that share each layer's matrices.
        pp: pipeline-parallel size, the stages that the layers are spread over.
        sequence_parallel: keep the tokens between the matrices split over the tensor-parallel ranks.
        stages: encoder layers of each pipeline stage, first to last; null balances them by their FLOPs.
    """

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    stages: list[int] | None = None

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold the same weights and see different images.

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
        """Raise ConfigError where this group contradicts itself."""
        for key in ("tp", "pp"):
            if getattr(self, key) < 1:
                raise ConfigError(f"parallel.{key}={getattr(self, key)} must be at least 1")
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true splits tokens over tensor-parallel ranks, and parallel.tp=1 has one; "
                "raise parallel.tp or set parallel.sequence_parallel=false"
            )
