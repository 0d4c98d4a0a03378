"""Shares of layers for pipeline stages, against brute force."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.modeling.partition import balance, stage_bounds, stage_costs


def _by_brute_force(costs, blocks, stages):
    best = None
    for cuts in combinations(range(1, len(costs)), stages - 1):
        bounds = [0, *cuts, len(costs)]
        spans = list(pairwise(bounds))
        if all(any(blocks[start:stop]) for start, stop in spans):
            costliest = max(sum(costs[start:stop]) for start, stop in spans)
            best = costliest if best is None else min(best, costliest)
    return best


def test_the_costliest_stage_is_as_cheap_as_can_be():
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(3, 9)
        costs = [draw.randint(0, 9) for _ in range(count)]
        blocks = [draw.random() < 0.6 for _ in range(count)]
        stages = draw.randint(1, count)
        expected = _by_brute_force(costs, blocks, stages)
        if expected is None:
            continue
        bounds = balance(costs, blocks, stages)
        assert bounds[0] == 0 and bounds[-1] == count and len(bounds) == stages + 1
        assert max(stage_costs(costs, bounds)) == expected


KINDS = ["Embedding", "Positions", *["Block"] * 6, "Norm", "Head"]
SIZES = [50, 1, *[10] * 6, 1, 50]


@pytest.mark.parametrize(
    ("method", "bounds"),
    [
        ("parameters", [0, 4, 7, 10]),
        ("uniform", [0, 3, 6, 10]),
        ("type:block", [0, 4, 6, 10]),
    ],
)
def test_methods(method, bounds):
    weights = {"parameters": SIZES, "uniform": [1] * 10, "type:block": [kind == "Block" for kind in KINDS]}[method]
    found = stage_bounds(method, KINDS, SIZES, 3)
    assert found[0] == 0 and found[-1] == len(KINDS)
    assert max(stage_costs(weights, found)) <= max(stage_costs(weights, bounds))


def test_every_stage_holds_a_block_however_heavy_the_embedding():
    bounds = stage_bounds("parameters", ["Embedding", "Block", "Block", "Norm", "Head"], [1000, 1, 1, 1, 1000], 2)
    assert bounds == [0, 2, 5]


def test_an_expression_that_matches_too_little_is_an_error():
    with pytest.raises(UserError, match=r"matches 1 layers, too few for 2 stages.*Embedding, Positions, Block"):
        stage_bounds("type:norm", KINDS, SIZES, 2)
