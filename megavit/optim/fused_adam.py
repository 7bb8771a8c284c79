"""AdamW with torch's fused kernel, in the state layout that Megatron-Core's distributed optimizer expects.

Megatron-Core takes Adam from Transformer Engine or apex. With neither it falls back to torch's AdamW, whose
distributed state it cannot resume (0.16.1: wrong `step`, crashes). This class keeps apex's layout, one integer `step`
per parameter group, on any device.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW with decoupled weight decay.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        bias_correction, adam_w_mode: arguments of apex's class; only True is supported.

    Source: arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        assert bias_correction and adam_w_mode
        super().__init__(
            params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay, step=0)
        )
        self._divisor = 1.0

    def divide_gradients_by(self, divisor: float) -> None:
        """Divide the gradients in the next step only, while its kernel reads them; it writes them back divided."""
        self._divisor = divisor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, one launch per group."""
        assert closure is None
        divisor, self._divisor = self._divisor, 1.0
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            group["step"] = int(group["step"]) + 1
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            beta1, beta2 = group["betas"]
            step = torch.full((), float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None if divisor == 1 else torch.full((), divisor, device=params[0].device),
            )
