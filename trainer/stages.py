"""Which layers of a model each pipeline stage holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .models.parameters import ParamSpec

_BLOCK = re.compile(r"\.(?:h|layers)\.(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """The parameters of one pipeline stage, and how many of its layers are blocks."""

    specs: tuple[ParamSpec, ...]
    blocks: int


def layers_of(table: Sequence[ParamSpec]) -> list[list[ParamSpec]]:
    """The layers of a pipeline: embeddings, every block, final norm and head. A tied head has the embedding again."""
    blocks: dict[int, list[ParamSpec]] = {}
    before, after = [], []
    for spec in table:
        if found := _BLOCK.search(spec.name):
            blocks.setdefault(int(found[1]), []).append(spec)
        else:
            (after if blocks else before).append(spec)
    if not any(spec.kind == "vocab" for spec in after):
        after.append(replace(before[0], name=before[0].name + " (tied)"))
    return [before, *(blocks[index] for index in sorted(blocks)), after]


def split_layers(table: Sequence[ParamSpec], stages: int, partition: str = "parameters") -> list[Stage]:
    """The layers shared out over `stages`, as DeepSpeed does it: by parameters, or (`uniform`) by count.

    Other ways of partitioning are planned as if by parameters.
    """
    if stages == 1:
        return [Stage(tuple(table), sum(map(_is_block, layers_of(table))))]
    layers = layers_of(table)
    weights = [1 if partition == "uniform" else sum(spec.numel for spec in layer) for layer in layers]
    bounds = balanced_bounds(weights, stages)
    return [
        Stage(tuple(spec for layer in layers[first:last] for spec in layer), sum(map(_is_block, layers[first:last])))
        for first, last in pairwise(bounds)
    ]


def _is_block(layer: Sequence[ParamSpec]) -> bool:
    return bool(_BLOCK.search(layer[0].name))


def balanced_bounds(weights: Sequence[int], parts: int) -> list[int]:
    """Bounds of `parts` runs of `weights` whose heaviest is as light as can be, none of them empty."""
    low, high = max(weights), sum(weights)
    while low < high:
        limit = (low + high) // 2
        if _runs(weights, limit, parts) is None:
            low = limit + 1
        else:
            high = limit
    bounds = _runs(weights, low, parts)
    assert bounds is not None
    return bounds


def _runs(weights: Sequence[int], limit: int, parts: int) -> list[int] | None:
    bounds, load = [0], 0
    for index, weight in enumerate(weights):
        must_leave = len(weights) - index == parts - len(bounds)  # one item for each part that is left
        if index > bounds[-1] and (load + weight > limit or must_leave):
            bounds.append(index)
            load = 0
        load += weight
    bounds.append(len(weights))
    return bounds if len(bounds) <= parts + 1 else None
