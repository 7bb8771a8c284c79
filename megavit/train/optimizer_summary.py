"""What a run says of its optimizer: which, what its state takes, and where the literature warns."""

from megavit.optim.config import OptimConfig, Optimizer

_FP32_BYTES = 4

# After this many times 1 / (1 - decay) steps 5 % of an average are still the weights it started from: e ** -3.
_TIME_CONSTANTS = 3


def state_bytes(config: OptimConfig) -> int:
    """Bytes of the optimizer's own state for each trained weight: Adam's two moments, or a momentum, in fp32."""
    if config.name is Optimizer.adamw:
        return 2 * _FP32_BYTES
    return _FP32_BYTES if config.momentum else 0


def describe_optimizer(config: OptimConfig, *, num_trained: int, num_weights: int, bf16: bool, dp: int) -> str:
    """One line: the rule, its bytes by weight, how many weights it trains.

    Args:
        config: the optim group.
        num_trained: weights of the whole model that are not frozen.
        num_weights: of the whole model.
        bf16: whether the weights have fp32 copies that the optimizer works on.
        dp: data-parallel ranks, which share Adam's state.
    """
    own_bytes = state_bytes(config)
    parts = [f"{own_bytes} bytes of state for each weight"]
    if bf16:
        parts.append(f"{_FP32_BYTES} of its fp32 copy")
    shared = config.name is Optimizer.adamw and dp > 1
    held = f"shared by {dp} data-parallel ranks" if shared else ("on every data-parallel rank" if dp > 1 else "")
    of_all = "all" if num_trained == num_weights else f"{num_trained:,} of the"
    trains = f"trains {of_all} {num_weights:,} weights"
    return f"optimizer {config.name.value}: {' + '.join(parts)}{f', {held}' if held else ''}; {trains}"


def warn_of_optimizer(config: OptimConfig, *, from_scratch: bool) -> str | None:
    """What the literature has against this choice, None where it has nothing.

    Args:
        config: the optim group.
        from_scratch: whether the weights that are trained start as they were drawn.

    Source: arXiv 2106.14881, section 5 (ViTs under SGD and AdamW).
    """
    if config.name is Optimizer.sgd and from_scratch:
        return (
            "warning: with plain SGD a Vision Transformer learns far worse from scratch than with AdamW (arXiv "
            "2106.14881); SGD is for fine-tuning: choose optim=adamw, or weights to start from, init_from=…"
        )
    return None


def warn_of_average(config: OptimConfig, *, num_steps: int) -> str | None:
    """That a run is too short for the moving average of its weights, None where it is not.

    Args:
        config: the optim group.
        num_steps: of the whole run.
    """
    if config.ema is None or num_steps * (1 - config.ema) >= _TIME_CONSTANTS:
        return None
    # Rounded to a digit this still fits: 5 / steps loses a third at most.
    fitting = 1 - float(f"{5 / num_steps:.1g}")
    way_out = f"optim.ema={fitting:g}" if fitting > 0 else "optim.ema=null"
    return (
        f"warning: optim.ema={config.ema:g} averages over about {1 / (1 - config.ema):,.0f} steps and the run has "
        f"{num_steps:,}: the average, by which the best checkpoint is chosen, stays close to the initial weights; set "
        f"{way_out}"
    )
