"""How many encoder layers each pipeline stage gets."""


def balance_layers(num_layers: int, num_stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0) -> list[int]:
    """Spread equal layers over stages so that the slowest stage is as fast as can be.

    Args:
        num_layers: encoder layers to place.
        num_stages: pipeline stages, at most as many as layers.
        first_cost: what the first stage does besides (patch embedding), in units of one encoder layer.
        last_cost: what the last stage does besides (head, decoder), in units of one encoder layer.

    Returns:
        Layers per stage, first to last; the first and every middle stage hold at least one.
    """
    counts = [1] * num_stages
    if num_stages > 1:
        counts[-1] = 0
    extra = [0.0] * num_stages
    extra[0] += first_cost
    extra[-1] += last_cost
    for _ in range(num_layers - sum(counts)):
        # Ties go to the later stage: it holds fewer microbatches in flight under 1F1B, so its memory is the freer.
        lightest = min(range(num_stages), key=lambda stage: (counts[stage] + extra[stage], -stage))
        counts[lightest] += 1
    return counts


def slowest_stage(counts: list[int], *, first_cost: float = 0.0, last_cost: float = 0.0) -> float:
    """The cost of the stage that all others wait for, in units of one encoder layer."""
    costs = [float(count) for count in counts]
    costs[0] += first_cost
    costs[-1] += last_cost
    return max(costs)


def useful_stages(num_layers: int, num_stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0) -> int:
    """The smallest number of stages that is as fast as `num_stages`: what stands whole on one stage bounds them all.

    Args:
        num_layers: encoder layers to place.
        num_stages: pipeline stages that are asked for.
        first_cost, last_cost: see `balance_layers`.
    """

    def slowest(stages: int) -> float:
        counts = balance_layers(num_layers, stages, first_cost=first_cost, last_cost=last_cost)
        return slowest_stage(counts, first_cost=first_cost, last_cost=last_cost)

    return min(stages for stages in range(1, num_stages + 1) if slowest(stages) <= slowest(num_stages))
