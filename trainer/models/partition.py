"""Which layers of a pipeline go to which stage. Needs no torch, so that plans can tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from ...data_prep.errors import UserError


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds of contiguous, non-empty stages whose costliest is as cheap as can be: stage s takes [bounds[s],
    bounds[s + 1]). Among equals, the one with the smallest sum of squares.
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    count = len(costs)
    # best[i]: (costliest stage, sum of squares, bounds) of the first i layers in the stages so far
    best: list[tuple[float, float, list[int]] | None] = [None] * (count + 1)
    best[0] = (0.0, 0.0, [0])
    for stage in range(stages):
        following: list[tuple[float, float, list[int]] | None] = [None] * (count + 1)
        for stop in range(stage + 1, count - (stages - stage - 1) + 1):
            options = []
            for start in range(stage, stop):
                before = best[start]
                if before is not None:
                    cost = prefix[stop] - prefix[start]
                    options.append((max(before[0], cost), before[1] + cost * cost, [*before[2], stop]))
            following[stop] = min(options)
        best = following
    found = best[count]
    assert found is not None, f"{count} layers cannot fill {stages} stages"
    return found[2]


def stage_bounds(method: str, kinds: Sequence[str], sizes: Sequence[float], stages: int) -> list[int]:
    """Bounds of the stages by one of the recipe's methods.

    Args:
        method: parameters, uniform, measured, or type:REGEX (an equal number of the layers whose kind matches).
        kinds: of every layer: Embedding, Positions, Block, Norm, Head.
        sizes: of every layer, trained parameters, or seconds if measured.

    Raises:
        UserError: the expression matches fewer layers than there are stages.
    """
    if method == "uniform":
        return balance([1.0] * len(kinds), stages)
    if not method.startswith("type:"):
        return balance(sizes, stages)
    pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
    costs = [1.0 if pattern.search(kind) else 0.0 for kind in kinds]
    if sum(costs) < stages:
        raise UserError(
            f"parallel.partition {method!r} matches {sum(costs):.0f} layers, too few for {stages} stages; "
            f"there are layers of type {', '.join(dict.fromkeys(kinds))}"
        )
    return balance(costs, stages)


def stage_costs(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """What each stage costs."""
    return [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
