"""Which parameters each pipeline stage holds. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..families.specs import ParamSpec
from ..modeling.partition import stage_bounds


@dataclass(frozen=True)
class Stage:
    """The parameters of one pipeline stage, and how many of its layers are blocks."""

    specs: tuple[ParamSpec, ...]
    blocks: int


@dataclass(frozen=True)
class Layer:
    """One layer of a pipeline."""

    kind: str  # as `modeling.pipeline` calls it: Embedding, Positions, Block, Norm, Head
    specs: tuple[ParamSpec, ...]


def layers_of(table: Sequence[ParamSpec]) -> list[Layer]:
    """The layers of a pipeline, in order. A tied head holds the embedding's weight again."""
    blocks: dict[int, list[ParamSpec]] = {}
    before, after = [], []
    for spec in table:
        if spec.layer is not None:
            blocks.setdefault(spec.layer, []).append(spec)
        else:
            (after if blocks else before).append(spec)
    head = [spec for spec in after if spec.kind == "vocab"] or [replace(before[0], name=before[0].name + " (tied)")]
    others = [spec for spec in before if spec.kind != "vocab"]
    norm = [spec for spec in after if spec.kind != "vocab"]
    return [
        *(Layer("Embedding", (spec,)) for spec in before if spec.kind == "vocab"),
        *([Layer("Positions", tuple(others))] if others else []),
        *(Layer("Block", tuple(blocks[index])) for index in sorted(blocks)),
        Layer("Norm", tuple(norm)),
        Layer("Head", tuple(head)),
    ]


def split_layers(table: Sequence[ParamSpec], stages: int, partition: str = "parameters") -> list[Stage]:
    """The layers as `stages` share them; `measured`, which needs the machine, is planned as if by parameters.

    Raises:
        UserError: the partition does not fit the model.
    """
    layers = layers_of(table)
    if stages == 1:
        return [Stage(tuple(table), sum(layer.kind == "Block" for layer in layers))]
    sizes = [sum(spec.numel for spec in layer.specs) for layer in layers]
    bounds = stage_bounds(partition, [layer.kind for layer in layers], sizes, stages)
    return [
        Stage(
            tuple(spec for layer in layers[first:last] for spec in layer.specs),
            sum(layer.kind == "Block" for layer in layers[first:last]),
        )
        for first, last in pairwise(bounds)
    ]
