"""Choose how many encoder layers each pipeline stage holds."""


def balance_layers(num_layers: int, num_stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0) -> list[int]:
    """Distribute equal layers over stages so that the slowest stage is as fast as possible.

    Args:
        num_layers: encoder layers to place.
        num_stages: pipeline stages, at most as many as layers.
        first_cost: cost of the first stage's other work (patch embedding), in units of one encoder layer.
        last_cost: cost of the last stage's other work (head, decoder), in units of one encoder layer.

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
        # Of equal stages the later one gets the layer: under 1F1B it holds fewer micro batches, so it has more memory.
        lightest = min(range(num_stages), key=lambda stage: (counts[stage] + extra[stage], -stage))
        counts[lightest] += 1
    return counts


def slowest_stage(counts: list[int], *, first_cost: float = 0.0, last_cost: float = 0.0) -> float:
    """Return the cost of the slowest stage, in units of one encoder layer."""
    costs = [float(count) for count in counts]
    costs[0] += first_cost
    costs[-1] += last_cost
    return max(costs)


def useful_stages(num_layers: int, num_stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0) -> int:
    """Return the smallest number of stages that is as fast as `num_stages`: work that cannot be split bounds the speed.

    Args:
        num_layers: encoder layers to place.
        num_stages: pipeline stages to compare with.
        first_cost, last_cost: see `balance_layers`.
    """

    def slowest(stages: int) -> float:
        counts = balance_layers(num_layers, stages, first_cost=first_cost, last_cost=last_cost)
        return slowest_stage(counts, first_cost=first_cost, last_cost=last_cost)

    return min(stages for stages in range(1, num_stages + 1) if slowest(stages) <= slowest(num_stages))
