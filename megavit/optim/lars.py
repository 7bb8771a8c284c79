"""timm's LARS for tensor-parallel weights: trust ratios use the norms of the full tensors."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm.optim.lars import Lars, lars
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# The entries of a parameter group that timm's function takes.
_SETTINGS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "trust_coeff",
    "eps",
    "trust_clip",
    "always_adapt",
)


class TensorParallelLars(Lars):
    """LARS with momentum.

    timm's function gets a rank's part of a matrix as a DTensor, whose norm torch reduces over the tensor-parallel
    ranks; weights that are the same on all of these ranks stay plain tensors.

    Args:
        params: groups of parameters or of their fp32 copies, with the attributes of tensor parallelism.
        lr: learning rate.
        weight_decay: part of the gradient.
        momentum: fraction of the last step that is added to the next.
        trust_coefficient: a step moves a matrix by about lr times this fraction of its norm.
        tensor_parallel_group: ranks that hold parts of the same matrices.

    Source: arXiv 1708.03888, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        trust_coefficient: float,
        tensor_parallel_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            trust_coeff=trust_coefficient,
            always_adapt=True,
        )
        self._group = tensor_parallel_group if tensor_parallel_group.size() > 1 else None
        self._mesh: DeviceMesh | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
            settings = {key: group[key] for key in _SETTINGS}
            lars(
                [self._full(param, param) for param in params],
                [self._full(param.grad, param) for param in params],
                [self._full(self.state[param]["momentum_buffer"], param) for param in params],
                **settings,
            )

    def _full(self, tensor: Tensor, param: Tensor) -> Tensor:
        """Return the full tensor that a tensor is this rank's part of; it shares the tensor's memory."""
        if self._group is None or not getattr(param, "tensor_model_parallel", False):
            return tensor.detach()
        if self._mesh is None:
            # A name per group: torch's cache returns an earlier mesh of the same ranks and name, even if its group was
            # destroyed (2.11).
            name = f"tp_{self._group.group_name}"
            self._mesh = DeviceMesh.from_group(self._group, param.device.type, mesh_dim_names=(name,))
        return DTensor.from_local(tensor.detach(), self._mesh, [Shard(param.partition_dim)], run_check=False)  # type: ignore[attr-defined]
