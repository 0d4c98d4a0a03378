"""Memory of one rank, planned without torch, by what DeepSpeed 0.19.8 allocates on each ZeRO stage.

Weights, gradients and optimizer states are exact, the padding of flat buffers included; the rest is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...data_prep.sizes import format_bytes
from ..families.specs import ParamSpec, padded_vocab, parameter_table
from ..optim.base import Optimizer
from ..optim.groups import grouped
from .activations import activation_bytes
from .layout import Layout
from .settings import BUCKET, Settings
from .stages import split_layers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. All but `host` and `snapshot` are on the accelerator; on a CPU both are the same memory."""

    parameters: int  # the weights that compute, whole or this rank's part of them
    gradients: int  # at the end of the backward pass, before ranks exchange them
    optimizer: int  # fp32 master weights and the optimizer's states
    buffers: int  # of communication, and parameters gathered by ZeRO-3
    activations: int  # at the peak of the backward pass
    update: int  # gradients that are left and their copies in the optimizer's step, when activations are gone
    host: int  # offloaded
    snapshot: int = 0  # on the host, from the first save on: what checkpoints are written from while training goes on

    @property
    def peak(self) -> int:
        """The most that is held at once on the accelerator."""
        return self.parameters + self.optimizer + max(self.gradients + self.buffers + self.activations, self.update)


@dataclass(frozen=True)
class Sizes:
    """Elements of each parameter of a rank: of those that it trains, in the groups that the optimizer has."""

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()  # bytes of the frozen ones that are kept in four bits; they are in no other field
    scales: int = 0  # bytes of what belongs to those; ZeRO does not partition it

    @property
    def trained(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    @property
    def all(self) -> tuple[int, ...]:
        return self.trained + self.frozen


def estimate_memory(
    model: Mapping[str, Any],
    layout: Layout,
    settings: Settings,
    seq_len: int,
    partition: str = "parameters",
    rows: Callable[[Sequence[ParamSpec]], list[ParamSpec]] = list,
    embedding_rate: float = 1.0,
) -> MemoryEstimate:
    """Memory of the heaviest rank.

    Args:
        model: complete configuration of a family that has a parameter table.
        settings: of the resolved JSON.
        partition: how a pipeline's layers are shared out.
        rows: puts the rows of an adapter beside those of a stage.
        embedding_rate: of embedding and head, which then are groups of their own.
    """
    assert settings.micro_batch is not None and settings.accumulation is not None
    table = parameter_table(model, layout.tensor)
    tokens = settings.micro_batch * seq_len // layout.sequence
    estimates = []
    for number, stage in enumerate(split_layers(table, layout.pipeline, partition)):
        sizes = _sizes(rows(stage.specs), layout.tensor, settings.optimizer, embedding_rate)
        states = _STATES[layout.zero_stage](sizes, layout, settings)
        activations = activation_bytes(
            model,
            settings.precision,
            tokens,
            stage.blocks,
            in_flight=min(layout.pipeline - number, settings.accumulation),
            checkpointing=settings.activation_checkpointing,
            head=number == layout.pipeline - 1,
            padded_vocab=padded_vocab(model["vocab_size"], layout.tensor),
            tensor=layout.tensor,
        )
        snapshot = _written(rows(stage.specs), stage.specs, layout, settings)
        estimates.append(MemoryEstimate(**states, activations=activations, snapshot=snapshot))
    return max(estimates, key=lambda estimate: estimate.peak + estimate.host)


def _written(specs: Sequence[ParamSpec], base: Sequence[ParamSpec], layout: Layout, settings: Settings) -> int:
    """Bytes that a rank writes of a checkpoint: of what is trained, fp32 weight and states; of what an adapter keeps
    beside it, the weight. Ranks that hold the same share the writing; what only tensor-parallel ones do is neglected.
    """
    named = {spec.name for spec in base}
    total = 0
    for spec in specs:
        elements = math.prod(spec.local_shape(0, layout.tensor))
        if spec.trained:
            total += (4 + settings.optimizer.state_bytes) * elements
        elif spec.name not in named:
            total += settings.precision.width * elements
    return _ceil(total, layout.data * layout.sequence) // (layout.data * layout.sequence)


def _sizes(specs: Sequence[ParamSpec], tensor: int, optimizer: Optimizer, embedding_rate: float) -> Sizes:
    def size(spec: ParamSpec) -> int:
        return math.prod(spec.local_shape(0, tensor))

    trained = [spec for spec in specs if spec.trained]
    groups = grouped(trained, lambda spec: spec, optimizer, embedding_rate)
    frozen = tuple(size(spec) for spec in specs if not spec.trained and not spec.packed)
    in_four_bits = [size(spec) for spec in specs if spec.packed]
    packed = tuple(_ceil(elements, 2) // 2 for elements in in_four_bits)
    return Sizes(tuple(tuple(map(size, own)) for _, own in groups), frozen, packed, sum(map(_scales, in_four_bits)))


def _scales(elements: int) -> int:
    """Double quantisation: a byte for every block of 64, fp32 for every 256 blocks, both codes and the mean scale."""
    blocks = _ceil(elements, 64) // 64
    return blocks + 4 * (_ceil(blocks, 256) // 256) + 4 * (16 + 256 + 1)


def _no_zero(sizes: Sizes, layout: Layout, settings: Settings) -> dict[str, int]:
    """Everything whole on every rank; the all-reduce copies gradients into flat buckets."""
    elements, width = sum(sizes.trained), settings.precision.width
    master = 4 * elements if width == 2 else 0
    copies = width * min(elements, BUCKET) if layout.data * layout.sequence > 1 else 0
    return {
        "parameters": width * sum(sizes.all) + sum(sizes.packed) + sizes.scales,
        "gradients": width * elements,
        "optimizer": settings.optimizer.state_bytes * elements + master,
        "buffers": 0,
        "update": width * elements + max(copies, master),
        "host": 0,
    }


def _zero_1_and_2(sizes: Sizes, layout: Layout, settings: Settings) -> dict[str, int]:
    """runtime/zero/stage_1_and_2.py: each group is one flat buffer, padded to 2 x ranks and cut into equal partitions;
    the master weights are a copy even in fp32."""
    width, ranks = settings.precision.width, layout.data * layout.sequence
    states_width = 4 + settings.optimizer.state_bytes  # of the fp32 master weights and their states
    flats = [_ceil(sum(group), 2 * ranks) for group in sizes.groups]
    partitions = [flat // ranks for flat in flats]
    part, owned = sum(partitions), _owned(sizes.groups, partitions)
    accumulates = settings.accumulation != 1
    bucket = width * settings.reduce_bucket_size
    buckets = bucket * (2 if settings.overlap_comm else 1)
    whole = width * sum(sizes.trained)
    gradients = whole if layout.zero_stage == 1 else width * owned * (1 + accumulates)
    whole_base = width * sum(sizes.frozen) + sum(sizes.packed) + sizes.scales
    states = {"parameters": width * sum(flats) + whole_base, "buffers": buckets}
    if not layout.offload_optimizer:
        # the step copies one group's gradients at a time: into one tensor, which bf16 and fp16 copy once more, to fp32
        update = width * owned + max((6 if width == 2 else 4) * partition for partition in partitions)
        return {**states, "gradients": gradients, "optimizer": states_width * part, "update": update, "host": 0}
    largest = max(sizes.trained)
    on_host = (states_width + 4 + width) * part + width * largest + (width * owned if accumulates else 0)
    states["buffers"] += width * largest
    gradients = whole if layout.zero_stage == 1 else width * owned
    return {**states, "gradients": gradients, "optimizer": 0, "update": 0, "host": on_host}


def _zero_3(sizes: Sizes, layout: Layout, settings: Settings) -> dict[str, int]:
    """runtime/zero/stage3.py: each parameter is cut into equal partitions; small ones stay whole beside theirs, unless
    there is but one rank. In fp32 the partition could be its own master weight, but DeepSpeed compares a device with a
    string and makes a copy."""
    width, ranks = settings.precision.width, layout.data * layout.sequence
    states_width = 4 + settings.optimizer.state_bytes  # of the fp32 master weights and their states
    partitions = [[_ceil(size, ranks) // ranks for size in group] for group in sizes.groups]
    part = sum(map(sum, partitions))
    frozen, packed = (sum(_ceil(size, ranks) // ranks for size in own) for own in (sizes.frozen, sizes.packed))
    resting = width * (part + frozen) + packed
    small, small_packed = (_persistent(own, settings) if ranks > 1 else 0 for own in (sizes.all, sizes.packed))
    gathered = width * _gathered(sizes.all, settings) + _gathered(sizes.packed, settings)
    states = states_width * part
    gradients = width * part
    bucket = width * settings.reduce_bucket_size
    copies = 4 * max(map(sum, partitions))  # the step's fp32 gradients of one group
    on_host = (resting if layout.offload_param else 0) + (
        states + gradients + 4 * part if layout.offload_optimizer else 0
    )
    return {
        "parameters": width * small + small_packed + sizes.scales + (0 if layout.offload_param else resting),
        "gradients": 0 if layout.offload_optimizer else gradients,
        "optimizer": 0 if layout.offload_optimizer else states,
        "buffers": bucket + (gathered if ranks > 1 else 0),
        "update": bucket + (0 if layout.offload_optimizer else gradients + copies),
        "host": on_host,
    }


_STATES = {0: _no_zero, 1: _zero_1_and_2, 2: _zero_1_and_2, 3: _zero_3}


def _owned(groups: Sequence[Sequence[int]], partitions: Sequence[int]) -> int:
    """Elements of the parameters that touch one rank's partition: the most that any rank has.

    ZeRO-1 and 2 keep the gradients of such parameters whole.
    """
    most: dict[int, int] = {}
    for group, partition in zip(groups, partitions, strict=True):
        start = 0
        for size in group:
            for rank in range(start // partition, (start + size - 1) // partition + 1):
                most[rank] = most.get(rank, 0) + size
            start += size
    return max(most.values())


def _persistent(sizes: Sequence[int], settings: Settings) -> int:
    return sum(size for size in sizes if size <= settings.persistence_threshold)


def _gathered(sizes: Sequence[int], settings: Settings) -> int:
    """Elements of gathered parameters: released only if not used again within the reuse distance, which holds a small
    model whole between forward and backward."""
    rest = sum(sizes) - _persistent(sizes, settings)
    if rest <= settings.max_reuse_distance:
        return min(rest, settings.max_live_parameters)
    return min(rest, max(sizes) + settings.prefetch_bucket_size)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def memory_rows(estimate: MemoryEstimate) -> list[tuple[str, str]]:
    """Name and size of each part, for a table."""
    return [(field.name, format_bytes(getattr(estimate, field.name))) for field in fields(estimate)]
