"""How many elements the parameters of one rank have, as ZeRO's arithmetic needs them. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..families.specs import ParamSpec, parameter_table
from ..optim.base import Optimizer
from ..optim.groups import grouped
from .stages import split_layers


@dataclass(frozen=True)
class Sizes:
    """Elements of each parameter of a rank: of those that it trains, in the groups that the optimizer has."""

    groups: tuple[tuple[int, ...], ...]
    state_bytes: tuple[int, ...]  # of the optimizer's states, per element of each group
    whole: tuple[bool, ...]  # groups of which ZeRO-1 and 2 keep those states of whole parameters
    shared: tuple[bool, ...] = ()  # groups of experts that ranks share, where there are any
    frozen: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()  # bytes of the frozen ones that are kept in four bits; they are in no other field
    scales: int = 0  # bytes of what belongs to those; ZeRO does not partition it
    head: int = 0  # elements of the output embedding, on the last stage, where it is trained
    beside: int = 0  # elements of what an adapter adds and does not train

    def holders(self, replicas: int, expert: int) -> list[int]:
        """Over how many ranks ZeRO cuts each group: those that hold the same of it."""
        return [replicas // expert if shared else replicas for shared in self.shared or (False,) * len(self.groups)]

    @property
    def trained(self) -> tuple[int, ...]:
        """Elements of every trained parameter, group after group."""
        return tuple(size for group in self.groups for size in group)

    @property
    def all(self) -> tuple[int, ...]:
        """The trained and the frozen ones; what is packed has its own field."""
        return self.trained + self.frozen


def stage_sizes(
    model: Mapping[str, Any],
    tensor: int,
    pipeline: int,
    partition: str,
    optimizer: Optimizer,
    rows: Callable[[Sequence[ParamSpec]], list[ParamSpec]] = list,
    embedding_rate: float = 1.0,
    expert: int = 1,
) -> list[tuple[Sizes, int]]:
    """What a rank of each pipeline stage holds, and how many blocks."""
    return [
        (_sizes(rows(stage.specs), stage.specs, (tensor, expert), optimizer, embedding_rate), stage.blocks)
        for stage in split_layers(parameter_table(model, tensor, expert), pipeline, partition)
    ]


def _sizes(
    specs: Sequence[ParamSpec],
    base: Sequence[ParamSpec],
    ranks: tuple[int, int],
    optimizer: Optimizer,
    embedding_rate: float,
) -> Sizes:
    """`ranks`: tensor and expert ones, which share parameters."""
    own_names = {spec.name for spec in base}

    def size(spec: ParamSpec) -> int:
        return math.prod(spec.local_shape(0, ranks[spec.axis == "expert"]))

    trained = [spec for spec in specs if spec.trained]
    groups = grouped(trained, lambda spec: spec, optimizer, embedding_rate)
    frozen = tuple(size(spec) for spec in specs if not spec.trained and not spec.packed)
    in_four_bits = [size(spec) for spec in specs if spec.packed]
    packed = tuple(round_up(elements, 2) // 2 for elements in in_four_bits)
    return Sizes(
        groups=tuple(tuple(map(size, own)) for _, own in groups),
        state_bytes=tuple(optimizer.state_bytes(group) for group, _ in groups),
        whole=tuple(not optimizer.elementwise and group.states is not None for group, _ in groups),
        shared=tuple(own[0].kind == "expert" for _, own in groups),
        frozen=frozen,
        packed=packed,
        scales=sum(map(_scales, in_four_bits)),
        head=sum(size(spec) for spec in [spec for spec in specs if spec.kind == "vocab"][-1:] if spec.trained),
        beside=sum(size(spec) for spec in specs if not spec.trained and spec.name not in own_names),
    )


def _scales(elements: int) -> int:
    """Double quantisation: a byte for every block of 64, fp32 for every 256 blocks, both codes and the mean scale."""
    blocks = round_up(elements, 64) // 64
    return blocks + 4 * (round_up(blocks, 256) // 256) + 4 * (16 + 256 + 1)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
