"""Which layers of a pipeline go to which stage. Needs no torch, so that plans can tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from ...data_prep.errors import UserError


def balance(costs: Sequence[float], blocks: Sequence[bool], stages: int) -> list[int]:
    """Bounds of contiguous stages whose costliest is as cheap as can be: stage s takes [bounds[s], bounds[s + 1]).

    Every stage holds at least one block: DeepSpeed's ZeRO-1 makes one collective call for each optimizer group, and a
    stage without matrices or without norms would have fewer groups than the others, which would wait for ever. Among
    equals, the partition with the smallest sum of squares.
    """
    count, cost_before, blocks_before = len(costs), [0.0], [0]
    for cost, block in zip(costs, blocks, strict=True):
        cost_before.append(cost_before[-1] + cost)
        blocks_before.append(blocks_before[-1] + block)
    # best[i]: (costliest stage, sum of squares, bounds) of the first i layers in the stages so far
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for _ in range(stages):
        following = {}
        for stop in range(1, count + 1):
            options = []
            for start, (costliest, squares, bounds) in best.items():
                if start < stop and blocks_before[stop] > blocks_before[start]:
                    cost = cost_before[stop] - cost_before[start]
                    options.append((max(costliest, cost), squares + cost * cost, [*bounds, stop]))
            if options:
                following[stop] = min(options)
        best = following
    assert count in best, f"{sum(blocks)} blocks cannot fill {stages} stages"
    return best[count][2]


def stage_bounds(method: str, kinds: Sequence[str], sizes: Sequence[float], stages: int) -> list[int]:
    """Bounds of the stages by one of the recipe's methods.

    Args:
        method: parameters, uniform, measured, or type:REGEX (an equal number of the layers whose kind matches).
        kinds: of every layer: Embedding, Positions, Block, Norm, Head.
        sizes: of every layer, trained parameters, or seconds if measured.

    Raises:
        UserError: the expression matches fewer layers than there are stages.
    """
    blocks = [kind == "Block" for kind in kinds]
    if method == "uniform":
        return balance([1.0] * len(kinds), blocks, stages)
    if not method.startswith("type:"):
        return balance(sizes, blocks, stages)
    pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
    costs = [1.0 if pattern.search(kind) else 0.0 for kind in kinds]
    if sum(costs) < stages:
        raise UserError(
            f"parallel.partition {method!r} matches {sum(costs):.0f} layers, too few for {stages} stages; "
            f"there are layers of type {', '.join(dict.fromkeys(kinds))}"
        )
    return balance(costs, blocks, stages)


def stage_costs(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """What each stage costs."""
    return [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
